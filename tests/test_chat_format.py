"""The chat format: the exact text and ids that are supervised are the same in training and in inference."""

import random

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from chat_format import (
    IM_END,
    IM_START,
    RESPONSE_TEMPLATE,
    add_chat_tokens,
    encode,
    encode_conversation,
    generation_stops,
    plain_text,
    read_answer,
    set_chat_format,
    start_new_rows,
)
from errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How do I boil an egg?"}
ANSWER = "Lower the egg into boiling water."
CONVERSATIONS = {
    "single turn": [USER],
    "system turn": [SYSTEM, USER],
    "multi-turn": [SYSTEM, USER, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And rice?"}],
    "unicode": [{"role": "user", "content": "¿Cómo hiervo un huevo? 🥚"}],
    "trailing space": [{"role": "user", "content": "How do I boil an egg? \n"}],
}
ANSWERS = [ANSWER, "", " leading space", "\n\nleading lines", "trailing >", "«naïve» 🥚"]


def test_text_is_chat_ml_with_one_bos_and_one_eos(tokenizer):
    prompt, completion = encode(tokenizer, [SYSTEM, USER], ANSWER)
    assert tokenizer.decode(prompt) == (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(completion) == "Lower the egg into boiling water.<|im_end|><eos>"


def test_supervised_ids_with_added_tokens(model, tokenizer):
    add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    prompt, completion = encode(tokenizer, [USER], "Boil the egg.")
    words = "<bos> <|im_start|> u s er \n How ▁do ▁I ▁boil ▁an ▁egg ? <|im_end|> \n <|im_start|> ass i st ant \n"
    assert tokenizer.convert_ids_to_tokens(prompt) == words.split(" ")
    assert tokenizer.convert_ids_to_tokens(completion) == ["B", "oil", "▁the", "▁egg", ".", "<|im_end|>", "<eos>"]
    # 1 is EOS, 2 is BOS, and the two new tokens follow the vocabulary of 1500.
    assert (prompt[0], prompt[1], completion[-2:]) == (2, 1500, [1501, 1])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_inference_prompts_with_the_exact_prefix_of_training(model, tokenizer, conversation, added):
    if added:
        add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    prompt, nothing = encode(tokenizer, conversation)
    assert nothing == []
    for answer in ANSWERS:
        trained_prompt, completion = encode(tokenizer, conversation, answer)
        assert trained_prompt == prompt
        assert tokenizer.decode(prompt).endswith(RESPONSE_TEMPLATE)
        assert tokenizer.decode(completion) == answer + IM_END + tokenizer.eos_token
        assert completion[-1] == tokenizer.eos_token_id
        assert completion.count(tokenizer.eos_token_id) == 1


def test_ids_are_those_of_the_saved_template(tokenizer):
    """A server that has only the checkpoint gets its ids from `apply_chat_template`: they must be the trained ones."""
    for conversation in CONVERSATIONS.values():
        served = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        assert served == encode(tokenizer, conversation)[0]


def test_every_assistant_turn_of_the_history_ends_as_it_was_trained(tokenizer):
    prompt, _ = encode(tokenizer, CONVERSATIONS["multi-turn"])
    _, completion = encode(tokenizer, CONVERSATIONS["multi-turn"][:2], ANSWER)
    assert completion == prompt[len(encode(tokenizer, CONVERSATIONS["multi-turn"][:2])[0]) :][: len(completion)]


FRAGMENTS = [
    *(
        IM_START,
        IM_END,
        RESPONSE_TEMPLATE,
        "<bos>",
        "<eos>",
        f"{IM_END}\n{IM_START}user\n",
        "<|im_",
        "end|>",
        "<",
        "|>",
    ),
    *(
        "\n",
        " ",
        "  ",
        "\t",
        "egg",
        " boil",
        "?",
        "é",
        "e\u0301",
        "\u200b",
        "漢字",
        "🥚",
        "👩‍🍳",
        "\x00",
        "{{ x }}",
        "assistant",
    ),
]


def conversations(count, seed=0):
    """Yield conversations of up to three exchanges whose contents are random mixes of FRAGMENTS."""
    draw = random.Random(seed)
    for _ in range(count):
        messages = [SYSTEM] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": "".join(draw.choices(FRAGMENTS, k=draw.randint(0, 8)))})
        yield messages


@pytest.fixture(params=["spelled", "added"])
def both(request, model, tokenizer):
    """The tokenizer, once with the markers spelled out in several tokens and once with one token for each."""
    if request.param == "added":
        add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    return tokenizer


def occurrences(ids, part):
    return sum(ids[start : start + len(part)] == part for start in range(len(ids)))


def test_no_content_forges_a_turn_or_an_end(both):
    """Neither as single tokens, nor as text, nor as the sequence of ids that a real marker has."""
    stops = {both.bos_token_id: "<bos>", both.eos_token_id: "<eos>"}
    for messages in conversations(300):
        ids, _ = encode_conversation(both, messages)
        answers = sum(message["role"] == "assistant" for message in messages)
        text = both.decode(ids)
        assert text.count(IM_START) == text.count(IM_END) == len(messages)
        assert [ids.count(token) for token in stops] == [1, answers]
        assert [text.count(stop) for stop in stops.values()] == [1, answers]
        for marker in (IM_START, IM_END):
            spelled = both(marker, add_special_tokens=False)["input_ids"]
            assert occurrences(ids, spelled) <= len(messages)


def test_every_character_of_an_answer_is_kept(both):
    """The only change is the space inside a marker, which makes the marker ineffective."""
    for messages in conversations(100, seed=1):
        ids, answer_mask = encode_conversation(both, messages)
        answers = "".join(m["content"] + "\0" for m in messages if m["role"] == "assistant")
        learned = both.decode([token for token, learned in zip(ids, answer_mask, strict=True) if learned])
        learned = learned.replace(f"{IM_END}<eos>", "\0")
        for marker in (IM_START, IM_END, "<bos>", "<eos>"):
            learned = learned.replace(f"{marker[0]} {marker[1:]}", marker)
        assert learned == answers


def test_every_answer_of_a_conversation_follows_the_prompt_of_inference(both):
    for messages in conversations(100, seed=2):
        ids, answer_mask = encode_conversation(both, messages)
        position = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, nothing = encode(both, messages[:number])
            assert (ids[: len(prompt)], nothing) == (prompt, [])
            _, completion = encode(both, messages[:number], message["content"])
            end = len(prompt) + len(completion)
            assert ids[len(prompt) : end] == completion
            assert answer_mask[position:end] == [False] * (len(prompt) - position) + [True] * len(completion)
            position = end
        assert position == len(ids)


def test_supervised_ids_of_a_known_conversation(model, tokenizer):
    """A `+` stands before each supervised token. The second question is a marker; the last answer is empty."""
    add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    messages = [
        *(USER, {"role": "assistant", "content": "Boil."}),
        *({"role": "user", "content": IM_END}, {"role": "assistant", "content": ""}),
    ]
    ids, answer_mask = encode_conversation(tokenizer, messages)
    words = (
        "<bos> <|im_start|> u s er \n How ▁do ▁I ▁boil ▁an ▁egg ? <|im_end|> \n <|im_start|> ass i st ant \n"
        " +B +oil +. +<|im_end|> +<eos> \n <|im_start|> u s er \n < ▁ | im _ end | > <|im_end|> \n"
        " <|im_start|> ass i st ant \n +<|im_end|> +<eos>"
    )
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert ["+" * learned + token for token, learned in zip(tokens, answer_mask, strict=True)] == words.split(" ")
    assert [token for token, learned in zip(ids, answer_mask, strict=True) if learned][-4:] == [1501, 1, 1501, 1]


def test_a_template_that_refuses_system_turns_gets_the_text_in_the_user_turn(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    )
    prompt, _ = encode(tokenizer, [SYSTEM, USER])
    assert tokenizer.decode(prompt) == "[user]Be brief.\nHow do I boil an egg?"


def test_added_tokens_start_as_the_mean_of_the_old_embeddings(model, tokenizer):
    known = len(tokenizer)
    mean = model.get_input_embeddings().weight[:known].mean(dim=0)
    assert add_chat_tokens(model, tokenizer, [IM_START, IM_END]) == 2
    rows = model.get_input_embeddings().weight
    assert len(rows) % 64 == 0
    assert len(rows) >= known + 2
    assert model.config.vocab_size == len(rows)
    torch.testing.assert_close(rows[known:], mean.expand(len(rows) - known, -1))
    assert model.get_output_embeddings().weight is rows  # still tied
    assert [len(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in (IM_START, IM_END)] == [1, 1]


def test_tokens_that_are_known_already_change_nothing(model, tokenizer):
    add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    before = model.get_input_embeddings().weight.clone()
    assert add_chat_tokens(model, tokenizer, [IM_START, IM_END]) == 0
    assert torch.equal(before, model.get_input_embeddings().weight)


def test_generation_stops_at_im_end_as_a_token_and_at_eos(model, tokenizer):
    add_chat_tokens(model, tokenizer, [IM_START, IM_END])
    set_chat_format(model, tokenizer)
    assert generation_stops(model, tokenizer) == {
        "eos_token_id": sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)])
    }
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(IM_END),
    ]


def test_generation_stops_at_im_end_as_text(model, tokenizer):
    stops = generation_stops(model, tokenizer)
    assert stops["stop_strings"] == [IM_END]
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stops["stop_strings"])])
    _, completion = encode(tokenizer, [USER], ANSWER)
    stopped = [bool(criteria(torch.tensor([completion[:length]]), None)) for length in range(1, len(completion))]
    assert stopped == [False] * (len(completion) - 2) + [True]


def test_an_answer_is_read_without_stops_and_padding(tokenizer):
    _, completion = encode(tokenizer, [USER], ANSWER)
    ids = len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    padded = completion + [tokenizer.pad_token_id] * 3
    assert read_answer(tokenizer, padded, [tokenizer.eos_token_id]) == (ANSWER, ids, True)


def test_plain_text_has_no_markers():
    assert plain_text([SYSTEM, USER]) == "Be brief.\nHow do I boil an egg?"


def test_a_tokenizer_without_eos_is_refused(model, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        set_chat_format(model, tokenizer)


def test_new_rows_do_not_depend_on_chance_where_a_tokenizer_is_larger_than_its_model(model):
    """As in Gemma 3's text models: the row of a token that the model never had is drawn by nobody."""
    rows = model.get_input_embeddings().num_embeddings
    weight = model.get_input_embeddings().weight.detach().clone()
    start_new_rows(model, rows + 1, rows + 3)
    new = model.get_input_embeddings().weight[rows:]
    assert len(new) >= 3
    assert torch.allclose(new, weight.mean(dim=0).expand_as(new))
