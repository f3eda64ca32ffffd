"""What is asked of tokens' distributions, and outputs that are whole or parts, on ranks and in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cut_cases import gradients_of
from family_cases import Case, data_mesh, fully_sharded, make_mesh, parallel_model, without_labels
from logprob_cases import CHANGES, rollouts

import odysseus_kernels as ody
from odysseus_kernels.nn.token_statistics import TokenStatistics

TEMPERATURE, TOP = 0.8, 4
DTYPE = torch.float64


def case_of(**settings: Any) -> Case:
    return Case(**{"dtype": DTYPE, "changes": CHANGES, **settings})


def teacher_ids(length: int = 21) -> torch.Tensor:
    """Some tokens for each, of which some are none."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(120, (2, length - 1, 3), generator=generator)
    ids[:, :2, 1] = -100
    return ids


def objective(found: TokenStatistics) -> torch.Tensor:
    """A number of everything that has a gradient, each token weighted differently."""
    weights = torch.linspace(0.5, 1.5, found.entropy.numel(), dtype=found.entropy.dtype).view_as(found.entropy)
    return (weights * (found.logprobs - 0.3 * found.entropy + 0.2 * found.id_logprobs.sum(-1))).sum()


def stock_statistics(model: Any, batch: dict[str, torch.Tensor]) -> TokenStatistics:
    """By the whole logits."""
    logits = model(**without_labels(batch), use_cache=False).logits[:, :-1] / TEMPERATURE
    log_p = logits.log_softmax(-1)

    def of(ids: torch.Tensor) -> torch.Tensor:
        return log_p.gather(-1, ids.clamp_min(0)).masked_fill(ids == -100, 0.0)

    labels = batch["labels"][:, 1:]
    top, top_ids = log_p.detach().topk(TOP)
    is_top1 = log_p.argmax(-1) == labels
    entropy = -(log_p.exp() * log_p).sum(-1)
    return TokenStatistics(of(labels[..., None])[..., 0], entropy, top_ids, top, is_top1, of(teacher_ids()))


def stock_step(case: Case, *, packed: bool) -> tuple[TokenStatistics, dict[str, torch.Tensor]]:
    model = case.model()
    found = stock_statistics(model, rollouts(packed=packed))
    objective(found).backward()
    return TokenStatistics(*(t.detach() for t in found)), gradients_of(model)


def parallel_step(
    rank: int, world_size: int, case: Case, strategy: str, ring: int, packed: bool
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    mesh = make_mesh(world_size, ring)
    model = parallel_model(case, strategy, mesh)
    part = ody.shard_sequence(rollouts(packed=packed), model)
    asked = {"entropy": True, "top_k": TOP, "top1": True, "temperature": TEMPERATURE}
    found = ody.sequence_logprobs(model, part, ids=teacher_ids(), **asked)
    assert not found.top_logprobs.requires_grad
    objective(found).backward()
    parts = ody.sequence_logprobs(model, part, gather=False, **asked)
    assert parts.id_logprobs is None
    whole = ody.gather_sequence(parts.entropy, part, model)[:, :-1]
    torch.testing.assert_close(whole, found.entropy)
    warm = ody.sequence_logprobs(model, part, temperature=TEMPERATURE)
    assert torch.equal(warm, found.logprobs)
    return tuple(t.detach() for t in found), gradients_of(model)


def distillation(rank: int, world_size: int, strategy: str) -> None:
    """Of the teacher's likeliest tokens, without labels; a part of ids with a part of the rest."""
    mesh = make_mesh(world_size, 1)
    student, teacher = parallel_model(case_of(), strategy, mesh), case_of().model(seed=1)
    ody.parallelize(teacher, mesh, strategy)
    batch = without_labels(rollouts())
    part = ody.shard_sequence(batch, student)
    divergences = []
    for gather in (True, False):
        with torch.no_grad():
            likely = ody.sequence_logprobs(teacher, part, top_k=TOP, gather=gather)
        assert likely.logprobs is None
        own = ody.sequence_logprobs(student, part, ids=likely.top_ids, gather=gather)
        terms = (likely.top_logprobs.exp() * (likely.top_logprobs - own.id_logprobs)).sum(-1)
        divergences.append(terms if gather else ody.gather_sequence(terms, part, student)[:, :-1])
    stock = [case_of().model(seed=seed)(**batch, use_cache=False).logits[:, :-1].log_softmax(-1) for seed in (1, 0)]
    top, ids = stock[0].topk(TOP)
    expected = (top.exp() * (top - stock[1].gather(-1, ids))).sum(-1)
    for found in divergences:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def beside_fsdp(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies and the likeliest tokens of this replica's row, asked of a wrapped model."""
    mesh = data_mesh((2, 1, 2))
    model = fully_sharded(ody.parallelize(case_of().model(), mesh, "ulysses"), mesh)
    replica = mesh.get_local_rank("dp")
    row = {name: tensor[replica : replica + 1] for name, tensor in rollouts().items()}
    part = ody.shard_sequence(row, model)
    found = ody.sequence_logprobs(model, part, entropy=True, top_k=TOP, temperature=TEMPERATURE)
    found.entropy.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" in name)
    return found.entropy.detach(), found.top_ids


def refusals(rank: int, world_size: int) -> None:
    mesh = make_mesh(world_size, 1)
    model = parallel_model(case_of(), "odysseus", mesh)
    batch = rollouts()
    part, bare = ody.shard_sequence(batch, mesh), ody.shard_sequence(without_labels(batch), mesh)
    for text, cut, settings in (
        ("expected a number above 0, got 0", part, {"temperature": 0}),
        ("top_k: expected a number of tokens, or 0 for none, got -1", part, {"top_k": -1}),
        ("expected top_k from 0 to the 120 ids", part, {"top_k": 121}),
        ("expected labels, the next tokens that the likeliest", bare, {"top1": True, "entropy": True}),
        ("expected labels, the tokens whose log-probabilities", bare, {"temperature": 2.0}),
        (r"ids: expected \[2, 20, k\].*goes with gather=False", part, {"ids": teacher_ids()[:, 1:]}),
        (r"this rank's part, \[2, 11, k\], got \[2, 20, 3\]", part, {"ids": teacher_ids(), "gather": False}),
        ("ids: expected int64 of three dimensions", part, {"ids": teacher_ids()[..., 0]}),
        ("got num_items_in_batch", part, {"entropy": True, "num_items_in_batch": 3}),
    ):
        with pytest.raises(ValueError, match=text):
            ody.sequence_logprobs(model, cut, **settings)


def different_ids(rank: int, world_size: int, strategy: str) -> str:
    """Whole ids that are not the same on every rank."""
    mesh = make_mesh(world_size, 1)
    model = parallel_model(case_of(), strategy, mesh)
    with pytest.raises(ody.RankMismatchError) as caught:
        ody.sequence_logprobs(model, ody.shard_sequence(rollouts(), model), ids=(teacher_ids() + rank).clamp(0, 119))
    return str(caught.value)


# ---- outputs that are whole, or parts --------------------------------------------------------------------------------


def outputs(rank: int, world_size: int, strategy: str, ring: int) -> dict[str, Any]:
    """Hidden states and logits put together, the last logits, tuples, and gradients of a loss of the last logits."""
    mesh = make_mesh(world_size, ring)
    model = parallel_model(case_of(), strategy, mesh)
    part = ody.shard_sequence(without_labels(rollouts()), model)
    given = model(**part, output_hidden_states=True)
    as_tuple = model(**part, output_hidden_states=True, return_dict=False)
    assert [type(one) for one in as_tuple] == [torch.Tensor, tuple]
    assert torch.equal(as_tuple[0], given.logits)
    found = {
        "hidden_states": [ody.gather_sequence(one, part, model) for one in as_tuple[1]],
        "by the mesh": ody.gather_sequence(given.hidden_states[-1], part, mesh),
    }
    found["kept"] = {keep: model(**part, logits_to_keep=keep).logits for keep in (1, 6, 15, 50)}
    last_loss(found["kept"][6]).backward()
    return {**found, "gradients": gradients_of(model)}


def last_loss(logits: torch.Tensor) -> torch.Tensor:
    return (logits.log_softmax(-1)[..., 7] * torch.arange(1.0, 7.0)).sum()


def stock_outputs() -> dict[str, Any]:
    model, batch = case_of().model(), without_labels(rollouts())
    as_tuple = model(**batch, use_cache=False, output_hidden_states=True, return_dict=False)
    assert [type(one) for one in as_tuple] == [torch.Tensor, tuple]
    kept = {keep: model(**batch, use_cache=False, logits_to_keep=keep).logits for keep in (1, 6, 15, 50)}
    last_loss(kept[6]).backward()
    return {"hidden_states": as_tuple[1], "kept": kept, "gradients": gradients_of(model)}


def tuples_with_a_loss(rank: int, world_size: int) -> tuple[float, int]:
    mesh = make_mesh(world_size, 1)
    model = parallel_model(case_of(), "odysseus", mesh)
    loss, *rest = model(**ody.shard_sequence(rollouts(), model), return_dict=False)
    for keep, text in ((True, "got True"), (-1, "got -1"), (torch.tensor([3]), r"got a tensor \[1\]")):
        with pytest.raises(ValueError, match=f"logits_to_keep: expected how many of the last tokens.*{text}"):
            model(**ody.shard_sequence(without_labels(rollouts()), model), logits_to_keep=keep)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 beside labels"):
        model(**ody.shard_sequence(rollouts(), model), logits_to_keep=2)
    return loss.item(), len(rest)
