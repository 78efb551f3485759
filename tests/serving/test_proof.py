"""What counts as the same in a proof."""

import copy

import pytest

from chat_format import encode
from errors import UserError
from serving.proof import Answer, SameIds, compare_answers, compare_ids, served_ids


def turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_answers_agree_up_to_their_first_difference():
    one = [Answer([1, 2, 3, 4], [-1, -1, -1, -1]), Answer([5, 6], [-2, -2]), Answer([7, 8], [-1, -1])]
    other = [Answer([1, 2, 9, 4], [-1, -1, -9, -9]), Answer([5, 6], [-2, -2.125]), Answer([7], [-1])]
    same = compare_answers(one, other)
    assert (same.answers, same.same, same.tokens, same.before, same.apart) == (3, 1, 8, 5, 0.125)
    assert str(same) == (
        "1 of 3 greedy answers are the same to the last of 32 tokens (62% of the tokens come before a difference), and "
        "the log-probs of their tokens to 0.1"
    )
    assert not same.exact
    assert compare_answers(one, one).exact
    assert not compare_answers(one[1:2], other[1:2]).exact  # the same answer, of another model


def test_a_history_that_merges_with_its_markers_is_counted(tokenizer):
    """Gemma's tokenizer has a token of two line breaks. Training does not let it span a marker and an answer."""
    tokenizer.add_tokens(["\n\n"])
    merges = turns("Hi.", "\nHello.", "Tea?")
    assert served_ids(tokenizer, merges) != encode(tokenizer, merges)[0]
    found = compare_ids(tokenizer, tokenizer, [turns("Hi."), turns("Hi.", "Hello.", "Tea?"), merges])
    assert (found.checked, found.in_history, found.refused) == (3, 1, 0)
    assert str(found).startswith(
        "the same token ids as in training for 2 of 3, the same text in other tokens for 1 with a history ("
    )


def test_a_history_with_another_text_is_a_mistake(tokenizer):
    served = copy.deepcopy(tokenizer)
    served.chat_template = tokenizer.chat_template.replace("{{- eos_token if message['role'] == 'assistant' }}", "")
    assert compare_ids(tokenizer, served, [turns("Hi.")]).checked == 1
    with pytest.raises(UserError, match=r"the folder's prompt of 'Tea\?' has other token ids than in training"):
        compare_ids(tokenizer, served, [turns("Hi.", "Hello.", "Tea?")])


def test_a_proof_tells_how_many_prompts_it_compared():
    assert str(SameIds(0, 0, 300)) == "none could be compared; 300 are refused by the chat template"
    assert str(SameIds(0, 0, 0)) == "none could be compared"
    assert str(SameIds(5, 0, 0)) == "the same token ids as in training for 5 of 5"


def test_a_first_turn_that_differs_is_a_mistake(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["boil an egg"])
    assert compare_ids(tokenizer, other, [turns("Hi.")]).checked == 1
    message = r"the folder's prompt of 'How do I boil an egg\?' has other token ids than in training, from token \d+ on"
    with pytest.raises(UserError, match=message):
        compare_ids(tokenizer, other, [turns("Hi."), turns("How do I boil an egg?")])
