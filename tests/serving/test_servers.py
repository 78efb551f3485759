"""What servers are given: the Modelfile's exact text, the commands, and what there is to know."""

from pathlib import Path

import pytest
from tokenizers import processors

from chat_format import ollama_template
from serving.servers import modelfile, remarks, serving_commands

# Ollama's own parser and template package (August 2026) were given this text once. What they rendered of one turn, of
# a system turn and of several turns was what our template renders, without its <bos>, which Ollama adds.
MODELFILE = '''FROM .
TEMPLATE """{{- range $i, $_ := .Messages }}{{ if $i }}
{{ end }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>{{ if eq .Role "assistant" }}<eos>{{ end }}{{ end }}
<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<eos>"
'''


def test_the_modelfile_says_what_our_chat_template_says(tokenizer):
    assert modelfile(tokenizer) == MODELFILE


def test_a_prompt_begins_with_one_bos(tokenizer):
    """If the tokenizer does not add it, as some of those that have one, neither does Ollama."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert ollama_template(tokenizer).startswith("<bos>{{- range ")
    tokenizer.bos_token = None
    assert ollama_template(tokenizer).startswith("{{- range ")


@pytest.mark.parametrize(("name", "called"), [("my-model", "my-model"), ("/a/Größe 2", "gr-e-2"), ("/a/...", "model")])
def test_commands(name, called):
    commands = dict(serving_commands(Path(name), "bfloat16", for_ollama=True))
    assert commands["Ollama"].endswith(f" && ollama run {called}")
    assert "--dtype" not in commands["vLLM"]
    assert list(dict(serving_commands(Path(name), "float16", for_ollama=False))) == ["transformers", "vLLM"]


def test_a_stop_of_several_tokens_is_told(tokenizer, model):
    assert [line[:38] for line in remarks(tokenizer, True)] == ["<|im_end|> is several tokens here, and"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert list(remarks(tokenizer, True)) == []
    assert [line[:44] for line in remarks(tokenizer, False)] == ["Ollama and llama.cpp read a tokenizer like t"]
