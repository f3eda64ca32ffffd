"""Rows of a prompt and its completions: what is in them, and how it comes out again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.data.shared_prefix import pack_shared_prefix, unpack_shared_prefix

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=6).map(torch.tensor)


def test_the_example_of_the_module() -> None:
    a, b, c, x, y, z = range(10, 16)
    packed = pack_shared_prefix([torch.tensor([a, b, c])], [[torch.tensor([x, y]), torch.tensor([z])]])
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "input_ids": [[a, b, c, x, y, c, z]],
        "labels": [[-100, -100, -100, x, y, -100, z]],
        "position_ids": [[0, 1, 2, 3, 4, 2, 3]],
        "shared_prefix": [[0, 0, 1, 1, 1, 2, 2]],
    }


@given(st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_what_a_token_sees_is_its_prompt_and_completion(groups: list[tuple[torch.Tensor, list[torch.Tensor]]]) -> None:
    prompts, completions = [prompt for prompt, _ in groups], [group for _, group in groups]
    packed = pack_shared_prefix(prompts, completions)
    for row, (prompt, group) in enumerate(groups):
        ids, numbers = packed["input_ids"][row], packed["shared_prefix"][row]
        for number, completion in enumerate(group, 1):
            seen = (numbers == 0) | (numbers == number)
            assert ids[seen].tolist() == [*prompt.tolist(), *completion.tolist()]
            assert packed["position_ids"][row][seen].tolist() == list(range(len(prompt) + len(completion)))
            assert packed["labels"][row][seen].tolist() == [-100] * len(prompt) + completion.tolist()
        counted = packed.get("counted_tokens", torch.ones_like(packed["input_ids"]))[row]
        assert torch.equal(counted, (numbers >= 0).long())
    # Of each next token the token itself: the completions come out.
    found = unpack_shared_prefix(packed["input_ids"][:, 1:], packed)
    assert [[one.tolist() for one in group] for group in found] == [[one.tolist() for one in c] for c in completions]


def test_values_of_several_numbers_and_gradients() -> None:
    packed = pack_shared_prefix([torch.tensor([1, 2])], [[torch.tensor([3]), torch.tensor([4, 5])]])
    values = torch.randn(1, packed["input_ids"].shape[1] - 1, 3, requires_grad=True)
    first, second = unpack_shared_prefix(values, packed)[0]
    assert first.shape == (1, 3) and second.shape == (2, 3)
    (first.sum() + 2 * second.sum()).backward()
    assert values.grad is not None
    assert values.grad[0, :, 0].tolist() == [0, 1, 0, 2, 2]


@pytest.mark.parametrize(
    ("prompts", "completions", "match"),
    [
        ([], [], "completions: expected those of each prompt, got 0 groups for 0 prompts"),
        ([torch.tensor([1])], [], "got 0 groups for 1 prompts"),
        ([torch.tensor([1])], [[]], r"completions\[0\]: expected at least one completion"),
        (
            [torch.tensor([], dtype=torch.int64)],
            [[torch.tensor([1])]],
            r"prompts\[0\]: expected token ids .* got \[0\]",
        ),
        ([torch.tensor([1])], [[torch.tensor([1.0])]], r"completions\[0\]\[0\]: expected token ids .* torch.float32"),
        ([[1]], [[torch.tensor([1])]], r"prompts\[0\]: expected token ids .* got list"),
    ],
)
def test_refusals(prompts: list[torch.Tensor], completions: list[list[torch.Tensor]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pack_shared_prefix(prompts, completions)


def test_values_of_another_batch() -> None:
    packed = pack_shared_prefix([torch.tensor([1, 2])], [[torch.tensor([3])]])
    with pytest.raises(ValueError, match=r"values: expected \[1, 2\], for each next token, got \[1, 3\]"):
        unpack_shared_prefix(torch.zeros(1, 3), packed)
    with pytest.raises(ValueError, match="batch: expected what pack_shared_prefix returned, got the keys"):
        unpack_shared_prefix(torch.zeros(1, 2), {"input_ids": packed["input_ids"]})
