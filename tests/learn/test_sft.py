"""Supervised fine-tuning learns the tokens that it should, and packing changes what is computed together only."""

import pytest
import torch
from graphs import BY_TIMING
from models import FAMILIES, assert_close, hugging_face_logits, make_policy

from tunix_torch import GRPOConfig
from tunix_torch.data.batches import Collator
from tunix_torch.data.packs import PackCollator, best_fit
from tunix_torch.data.rows import COMPLETION_IDS, LEARNED, PROMPT_IDS
from tunix_torch.learn import passes
from tunix_torch.learn.sft import completion_loss, learn_rows, sft_batch
from tunix_torch.model.attention import GROUPED, use_own_attention
from tunix_torch.model.forward import base_model, recompute_layers
from tunix_torch.model.loading import place
from tunix_torch.runtime import device

PAD, WIDTH = 0, 40


def rows_of(lengths, seed=0):
    """Rows of random tokens: (prompt, completion) lengths; about every third token of completions is not learned."""
    random = torch.Generator().manual_seed(seed)

    def tokens(count, low=3, high=97):
        return torch.randint(low, high, (count,), generator=random).tolist()

    return [
        {PROMPT_IDS: tokens(p), COMPLETION_IDS: tokens(c), LEARNED: [*map(int, map(bool, tokens(c - 1, 0, 3))), 1]}
        for p, c in lengths
    ]


LENGTHS = [(9, 12), (1, 3), (12, 20), (4, 1), (7, 7), (15, 2), (2, 9)]
ROWS = rows_of(LENGTHS)


def length(row):
    return len(row[PROMPT_IDS]) + len(row[COMPLETION_IDS])


def learn(model, batches, **settings):
    """Return loss and gradients of `learn_rows`, over all batches of one optimizer step."""
    settings = {"use_grpo": False, "micro_batch_size": 0, "report_to": "none"} | settings
    args = GRPOConfig(output_dir="unused", **settings)
    if args.gradient_checkpointing:
        recompute_layers(model)
    model.zero_grad()
    losses = [
        learn_rows(model, batch, batches, args, lambda loss: loss.backward(), lambda: None)[0] for batch in batches
    ]
    gradients = [p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]
    return sum(losses).cpu(), torch.cat(gradients).cpu()


def plain_batch(rows=ROWS):
    return Collator(PAD, 20, 20)(rows)


def packed_batch(rows=ROWS):
    packs = best_fit(list(map(length, rows)), WIDTH)
    assert len(packs) < len(rows)
    return PackCollator(PAD, WIDTH)([[rows[i] for i in pack] for pack in packs])


def expected_loss(model, rows):
    """The mean cross-entropy of all learned tokens, row by row by Hugging Face's own forward."""
    losses = []
    for row in rows:
        ids = torch.tensor(row[PROMPT_IDS] + row[COMPLETION_IDS])
        learned = torch.tensor([0] * len(row[PROMPT_IDS]) + row[LEARNED]).bool()
        scores = hugging_face_logits(model, ids)[:-1]
        losses.append(torch.nn.functional.cross_entropy(scores, ids[1:], reduction="none")[learned[1:]])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_learned_tokens_by_hugging_faces_own_forward(family):
    model = make_policy(family)
    expected = expected_loss(model, ROWS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    for batch in (plain_batch(), packed_batch()):
        loss, gradients = learn(model, [batch])
        assert_close(loss, expected, 1e-5)
        assert_close(gradients, gradient, 2e-5)
    assert completion_loss(model, ROWS, Collator(PAD, 20, 20), 3) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own_attention", [False, True])
def test_packed_rows_give_the_loss_and_gradient_of_plain_ones(family, own_attention):
    model = make_policy(family)
    if own_attention:
        base_model(model).set_attn_implementation(GROUPED)
    loss, gradients = learn(model, [plain_batch()])
    for settings in ({}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}):
        packed_loss, packed_gradients = learn(model, [packed_batch()], **settings)
        assert_close(packed_loss, loss, 1e-5)
        assert_close(packed_gradients, gradients, 2e-5)


def test_accumulated_batches_of_packs_give_the_gradient_of_one():
    model, whole = make_policy("gemma3"), packed_batch()
    names = [name for name in whole if name != "rows"]
    halves = [{name: whole[name][part] for name in names} | {"rows": []} for part in (slice(0, 1), slice(1, None))]
    for ours, expected in zip(learn(model, halves), learn(model, [whole]), strict=True):
        assert_close(ours, expected, 1e-5)


def test_a_rows_loss_does_not_depend_on_the_others_of_its_pack():
    model = make_policy("gemma3")
    alone = [learn(model, [PackCollator(PAD, WIDTH)([[row]])])[0] * sum(row[LEARNED]) for row in ROWS]
    total, _ = learn(model, [packed_batch()])
    assert_close(total * sum(sum(row[LEARNED]) for row in ROWS), sum(alone), 1e-5)


def test_where_shapes_are_static_packs_have_one_shape(monkeypatch):
    monkeypatch.setattr(device, "step_kind", lambda: "compiled")
    shapes = set()
    for seed in range(4):
        rows = rows_of([(3 + seed, 4), (9, 2 + 3 * seed), (12, 6), (8, 1)], seed)
        packs = best_fit(list(map(length, rows)), WIDTH)[:1]
        batch = PackCollator(PAD, WIDTH)([[rows[i] for i in pack] for pack in packs])
        shapes.add(tuple((name, tuple(value.shape)) for name, value in batch.items() if name != "rows"))
    assert len(shapes) == 1


def test_packs_are_shared_out_by_micro_batch_size():
    batch = packed_batch()
    parts = passes.lay_out_packs(sft_batch(batch, 1), batch["segments"], batch["offsets"], 1)
    assert [len(part.batch.completion_ids) for part in parts] == [1] * len(batch["completion_ids"])
    assert torch.equal(torch.cat([part.blocks[0].segments for part in parts]), batch["segments"])


@pytest.mark.xla
def test_on_xla_packs_give_the_loss_of_hugging_faces_own_forward_and_compile_nothing_new():
    model = make_policy("gemma3")
    batches = [rows_of([(1 + (p + seed) % 15, 1 + (c + seed) % 20) for p, c in LENGTHS], seed) for seed in range(5)]
    expected = [float(expected_loss(model, rows)) for rows in batches]
    use_own_attention(base_model(model))  # as a trainer's model has it
    place(model)
    counts = []
    for rows, loss_of_rows in zip(batches, expected, strict=True):
        # the lengths of rows differ from batch to batch, and so do the packs; empty ones make them equally many
        packs = [[rows[i] for i in pack] for pack in best_fit(list(map(length, rows)), WIDTH)]
        loss, _ = learn(model, [PackCollator(PAD, WIDTH)(packs + [[]] * (6 - len(packs)))])
        assert float(loss) == pytest.approx(loss_of_rows, abs=1e-4)
        counts.append(device.counters()["compilations"])
    assert counts[1] > 0 and 0 <= counts[-1] - counts[1] <= BY_TIMING, counts
