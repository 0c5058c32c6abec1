"""Sampling follows the model's distribution, a decode step equals a full forward, and randomness belongs to the row."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import (
    FAMILIES,
    PAD,
    WINDOW,
    add_nontrivial_lora,
    hugging_face_logits,
    make_batch,
    make_model,
    token_logps,
    with_completions,
)
from rollouts import GROUP, MORE, NEVER, PARAMS, SOME, assert_same
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tunix_torch.rollout.sampler
from tunix_torch.model.forward import base_model
from tunix_torch.model.loading import place
from tunix_torch.rollout import ladders
from tunix_torch.rollout.ladders import cache_widths, group_sizes
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import (
    SamplingParams,
    choose_tokens,
    draw_uniforms,
    penalize_repetition,
    tokens_in_prompts,
)
from tunix_torch.runtime import device

every_family = pytest.mark.parametrize("family", FAMILIES)


def make_policy(family="gemma3", **lora):
    return place(add_nontrivial_lora(make_model(family), **lora))


def sample(
    model,
    eos=SOME,
    params=PARAMS,
    group=GROUP,
    uniforms=None,
    prompts=None,
    pad=PAD,
    interval=16,
    static=False,
    **options,
):
    """Sample for prompts of length 19, 11 and 3, unless others are given; `static` means in few shapes, as on XLA."""
    ids, mask = prompts or (make_batch().prompt_ids, make_batch().prompt_mask)
    if uniforms is None:
        uniforms = draw_uniforms((0, 1), range(len(ids) * group), params.max_new_tokens)
    with pytest.MonkeyPatch.context() as patch:
        if static:
            patch.setattr(device, "step_kind", lambda: "compiled")
        return Sampler(model, eos, pad, interval, **options).sample(ids, mask, group, params, uniforms)


# ---- a decode step against a full forward ----


@every_family
@pytest.mark.parametrize("params", [PARAMS, SamplingParams(20, 0.6, top_k=20, top_p=0.9)])
def test_cached_decode_equals_a_full_forward(family, params):
    model = make_policy(family)
    rollout = sample(model, params=params)
    assert rollout.completion_mask.sum(-1).max() > WINDOW + 1, "the window never leaves the prompt"
    batch = with_completions(make_batch(), rollout.completion_ids, rollout.completion_mask)
    expected, _ = token_logps(model, batch, params.temperature)
    torch.testing.assert_close(rollout.sampler_logps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "params", [SamplingParams(20, 0.8, top_k=5), SamplingParams(20, 1.2, top_p=0.7), SamplingParams(20, 0.9, 20, 0.8)]
)
def test_truncated_log_probabilities_are_those_among_the_candidates(params):
    """The same tokens are chosen, and the log-probability of each is its share of the candidates' probability."""
    model = make_policy()
    plain, truncated = (sample(model, params=replace(params, truncated_logps=value)) for value in (False, True))
    assert torch.equal(plain.completion_ids, truncated.completion_ids)
    gap = truncated.sampler_logps - plain.sampler_logps
    assert (gap > -1e-6).all() and gap.max() > 0.1 and truncated.sampler_logps.max() < 1e-6
    scores = torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    uniforms = torch.linspace(0, 0.999, 50)
    tokens, logps = choose_tokens(scores, uniforms, replace(params, truncated_logps=True))
    for row, token, logp in zip(scores, tokens, logps, strict=True):
        probs = torch.softmax(row / params.temperature, dim=0)
        order = probs.argsort(descending=True)[: params.top_k or None]
        share = probs[order] / probs[order].sum()
        kept = order[share.cumsum(0) - share < params.top_p]
        assert float(logp) == pytest.approx(float((probs[token] / probs[kept].sum()).log()), abs=1e-5)


@every_family
@pytest.mark.parametrize("params", [replace(PARAMS, temperature=0.0), SamplingParams(20, 0.9, top_k=30, top_p=0.95)])
def test_every_token_is_chosen_from_a_full_forward_without_a_cache(family, params):
    """Greedy sampling repeats argmax; otherwise uniform number t of a row decides its token t."""
    model, batch, group = make_policy(family), make_batch(), 2
    uniforms = draw_uniforms((0, 1), range(3 * group), params.max_new_tokens)
    rollout = sample(model, params=params, group=group, uniforms=uniforms)
    for i, (ids, kept) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        prompt = row = batch.prompt_ids[i // group][batch.prompt_mask[i // group]]
        for uniform in uniforms[i]:
            scores = hugging_face_logits(model, row)[-1:]
            token = choose_tokens(scores, uniform[None], params)[0] if params.temperature else scores.argmax()[None]
            row = torch.cat((row, token))
            if int(token) in SOME:
                break
        assert ids[kept].tolist() == row[len(prompt) :].tolist()


@every_family
@pytest.mark.parametrize("eos", [SOME, NEVER])
def test_fixed_shapes_and_growing_ones_give_the_same_completions(family, eos):
    model = make_policy(family)
    assert_same(sample(model, eos=eos, static=True), sample(model, eos=eos))


@every_family
def test_a_static_cache_grows_in_portions(family, monkeypatch):
    model = make_policy(family)
    expected = sample(model, eos=NEVER)
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [1, 4, 10, room])
    assert_same(sample(model, eos=NEVER, static=True), expected)


def decoded_shapes(monkeypatch):
    """Return a list that receives, from each coming decode step, its rows and the widest cache of their own tokens."""
    shapes, kind = [], tunix_torch.rollout.sampler.SharedPrefixCache

    def noting(layer_ids, windows, keys, values, own_keys, *others):
        shapes.append((len(own_keys[0]), max(x.shape[2] for x in own_keys)))
        return kind(layer_ids, windows, keys, values, own_keys, *others)

    monkeypatch.setattr(tunix_torch.rollout.sampler, "SharedPrefixCache", noting)
    return shapes


@every_family
@pytest.mark.parametrize("compile_ahead", [False, True])
def test_groups_with_fixed_shapes_are_halved_as_rows_end(family, compile_ahead, monkeypatch):
    """All groups are halved once the one with most rows left needs no more than a half, whatever was rehearsed."""
    monkeypatch.setattr(ladders, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [1, 4, 10, room])
    model, group, interval = make_policy(family), 7, 2
    uniforms = draw_uniforms((0, 2), range(3 * group), PARAMS.max_new_tokens)
    options = {"eos": MORE, "group": group, "uniforms": uniforms}
    expected = sample(model, **options)
    shapes = decoded_shapes(monkeypatch)
    assert_same(sample(model, **options, static=True, interval=interval, compile_ahead=compile_ahead), expected)
    lengths = expected.completion_mask.sum(-1).view(3, group)
    # Decoding stops when the sampler sees that all rows have ended.
    num_steps = -(-(int(lengths.max()) - 1) // interval) * interval
    num_steps = min(num_steps, PARAMS.max_new_tokens - 1)
    decoded, rehearsed = shapes[-num_steps:], shapes[:-num_steps]
    assert {rows for rows, _ in decoded} == {21, 12, 6}, "a size that does not occur"
    for t, (rows, _) in enumerate(decoded, start=1):  # step t feeds token t of every row
        most_left = int((lengths > t).sum(1).max())
        assert rows >= 3 * most_left, "a row left before it had ended"
        looked = int((lengths > (t - 1) // interval * interval + 1).sum(1).max()) if t > interval else group
        assert rows == 3 * next(size for size in (2, 4, 7) if size >= looked), "a group was not halved when it could"
    assert set(decoded) <= set(rehearsed) if compile_ahead else not rehearsed


@given(group=st.integers(1, 64), prompts=st.integers(1, 8), axis=st.sampled_from([1, 2, 4, 8]))
def test_sizes_of_groups_on_a_mesh(group, prompts, axis):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladders.mesh, "axis_size", lambda name: axis)
        sizes = group_sizes(group, prompts, 128)
        assert group_sizes(group, prompts, 127) == [group]
    assert sizes[0] == group and len(sizes) <= 3
    assert all(prompts * size % axis == 0 for size in sizes[1:])
    assert all(b == (a + 1) // 2 < a for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("window", [1, 2, 7, 18, 19, 20, 21, 38, 39])
@pytest.mark.parametrize("static", [False, True])
def test_layers_with_a_sliding_window_keep_no_more_and_change_nothing(static, window, monkeypatch):
    """Prompts have up to 19 tokens, and completions have 20, of which no token attends to the last."""
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [1, 4, 10, room])
    made, kind = [], tunix_torch.rollout.sampler.SharedPrefixCache
    monkeypatch.setattr(
        tunix_torch.rollout.sampler, "SharedPrefixCache", lambda *args: made.append(kind(*args)) or made[-1]
    )
    model = place(add_nontrivial_lora(make_model("gemma3", sliding_window=window)))
    rollout = sample(model, eos=NEVER, static=static)
    batch = with_completions(make_batch(), rollout.completion_ids, rollout.completion_mask)
    torch.testing.assert_close(rollout.sampler_logps, token_logps(model, batch)[0], rtol=0, atol=1e-4)
    kept = {i: (prompt.shape[2], own.shape[2]) for i, (prompt, _, own, _) in made[-1].layers.items()}
    # Where shapes are free, a step does not read tokens that the window has left behind.
    of_prompt = min(19, max(1, window - 1))
    assert kept == {0: (of_prompt if static else min(of_prompt, max(0, window - 19)), min(19, window)), 1: (19, 19)}


@given(room=st.integers(0, 5000))
def test_widths_of_a_static_cache(room):
    widths = cache_widths(room)
    assert widths == sorted(set(widths)) and widths[-1] == room and len(widths) <= 4
    assert all(width % 128 == 0 for width in widths[:-1])
    assert len(widths) == 1 or min(b - a for a, b in itertools.pairwise([0, *widths])) >= 64


def test_rows_that_have_ended_cost_nothing_more():
    """Where shapes follow the data, a step decodes the rows that are left, and up to an eighth more."""
    model, rows = make_policy(), []
    hook = (
        base_model(model)
        .get_decoder()
        .register_forward_hook(
            lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
    )
    lengths = sample(model, group=16).completion_mask.sum(-1)
    hook.remove()
    assert rows[0] == 3 and min(rows[1:]) < 24
    for t, decoded in enumerate(rows[1:], start=1):  # step t feeds token t of every row
        left = int((lengths > t).sum())
        assert left <= decoded <= left * 8 / 7 + 1


def test_greedy_sampling_needs_no_randomness():
    greedy, other = replace(PARAMS, temperature=0.0), draw_uniforms((9, 9), range(9), 20)
    assert_same(sample(make_policy(), params=greedy), sample(make_policy(), params=greedy, uniforms=other))


def test_a_bfloat16_model_samples():
    model = add_nontrivial_lora(make_model("gemma3").to(torch.bfloat16))
    rollout = sample(model)
    assert rollout.sampler_logps.dtype == torch.float32 and rollout.sampler_logps.isfinite().all()
    batch = with_completions(make_batch(), rollout.completion_ids, rollout.completion_mask)
    learned, exact = (token_logps(m, batch)[0] for m in (model, copy.deepcopy(model).float()))
    # The sampler rounds in another order than the learner, but no more than the learner does.
    assert (rollout.sampler_logps - learned).abs().mean() < (learned - exact).abs().mean()


def test_a_model_with_an_attention_of_its_own_is_refused():
    with pytest.raises(ValueError, match="model_type='gptj': its attention"):
        Sampler(GPTJForCausalLM(GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)), SOME, PAD)


# ---- repetition ----

PENALIZED = SamplingParams(20, 0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.7)


@every_family
@pytest.mark.parametrize("params", [PENALIZED, replace(PENALIZED, temperature=0.0)])
@pytest.mark.parametrize("static", [False, True])
def test_every_token_is_chosen_by_the_processors_of_transformers(family, params, static):
    """Prompt and completion so far are penalised, whatever rows have left; log-probabilities stay the learner's."""
    model, batch, group = make_policy(family), make_batch(), 2
    uniforms = draw_uniforms((0, 1), range(3 * group), params.max_new_tokens)
    options = {"params": params, "group": group, "uniforms": uniforms, "static": static, "interval": 2}
    rollout = sample(model, **options, compile_ahead=static)
    for i, (ids, kept) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        prompt = row = batch.prompt_ids[i // group][batch.prompt_mask[i // group]]
        for uniform in uniforms[i]:
            scores = hugging_face_logits(model, row)[-1:]
            scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(row[None], scores)
            token = choose_tokens(scores, uniform[None], replace(params, repetition_penalty=1.0))[0]
            row = torch.cat((row, token))
            if int(token) in SOME:
                break
        assert ids[kept].tolist() == row[len(prompt) :].tolist()
    assert not torch.equal(rollout.completion_ids, sample(model, **options | {"params": PARAMS}).completion_ids)
    batch = with_completions(make_batch(), rollout.completion_ids, rollout.completion_mask)
    expected, _ = token_logps(model, batch, params.temperature or 1.0)
    torch.testing.assert_close(rollout.sampler_logps, expected, rtol=0, atol=1e-4)


def test_the_penalty_is_that_of_transformers_and_padding_is_not_seen():
    torch.manual_seed(0)
    ids, scores = torch.randint(1, 12, (5, 7)), torch.randn(5, 12)
    mask = torch.arange(7) >= torch.tensor([0, 2, 6, 3, 0])[:, None]
    ids = ids.masked_fill(~mask, 0)
    seen = tokens_in_prompts(ids, mask, 1, 12)
    for penalty in (0.5, 1.3, 4.0):
        for row, kept, row_seen, row_scores in zip(ids, mask, seen, scores, strict=True):
            expected = RepetitionPenaltyLogitsProcessor(penalty)(row[kept][None], row_scores[None])
            assert torch.equal(penalize_repetition(row_scores[None], row_seen[None], penalty), expected)


# ---- choosing a token ----

# Logits are distinct multiples of 1/8, which are exact in float32, so that only `test_ties` has ties.
LOGITS = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(lambda values: np.array(values) / 8)
SETTINGS = st.builds(
    SamplingParams,
    max_new_tokens=st.just(1),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
)


def truncated_distribution(scores, params):
    """Apply temperature, top-k, top-p and min-p in this order, in float64; None when float32 might cut elsewhere."""
    probs = np.exp(scores / params.temperature - (scores / params.temperature).max())
    order = np.argsort(-probs)
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    better = np.cumsum(probs[order]) - probs[order]  # this much probability ranks higher
    if params.top_p < 1:
        if np.abs(better - params.top_p).min() < 1e-5:
            return None
        probs[order[better >= params.top_p]] = 0
    if params.min_p:
        gaps = np.abs(probs / probs.max() - params.min_p)
        if gaps[order[1:]].min() < 1e-5:
            return None
        probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


def choose(scores, uniforms, params):
    """Choose a token for each uniform number, all from the same scores."""
    uniforms = torch.as_tensor(uniforms, dtype=torch.float32)
    tokens, logps = choose_tokens(torch.tensor(scores, dtype=torch.float32).expand(len(uniforms), -1), uniforms, params)
    return tokens.numpy(), logps.numpy()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LOGITS, SETTINGS)
def test_tokens_follow_the_truncated_distribution(scores, params):
    expected = truncated_distribution(scores, params)
    assume(expected is not None)
    grid = (np.arange(500) + 0.5) / 500
    tokens, _ = choose(scores, grid, params)
    share = np.bincount(tokens, minlength=len(scores)) / len(grid)
    np.testing.assert_allclose(share, expected, atol=1 / len(grid) + 1e-5)
    assert not share[expected == 0].any(), "a token outside the candidates"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LOGITS, SETTINGS)
def test_candidates_are_those_of_transformers(scores, params):
    expected = truncated_distribution(scores, params)
    assume(expected is not None)
    warped = TemperatureLogitsWarper(params.temperature)(None, torch.tensor(scores)[None])
    warped = TopKLogitsWarper(params.top_k)(None, warped) if params.top_k else warped
    warped = TopPLogitsWarper(params.top_p)(None, warped) if params.top_p < 1 else warped
    warped = MinPLogitsWarper(params.min_p)(None, warped)
    assert torch.equal(warped[0].isfinite(), torch.tensor(expected > 0))
    candidates = np.flatnonzero(expected > 1e-5)
    # In the order of the vocabulary each token has a share of [0, 1). These are the middles of the shares.
    middles = np.cumsum(expected) - expected / 2
    assert choose(scores, middles[candidates], params)[0].tolist() == candidates.tolist()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(LOGITS, SETTINGS)
def test_the_logp_of_a_token_is_that_of_the_whole_vocabulary(scores, params):
    tokens, logps = choose(scores, np.linspace(0, 0.99, 20), params)
    expected = torch.log_softmax(torch.tensor(scores) / params.temperature, dim=-1)[tokens]
    np.testing.assert_allclose(logps, expected, atol=2e-5)


# Numbers from 0 to below 1 are drawn, but rounding on a device may yield 1.
EXTREMES = [0.0, 2**-24, 0.5, 1 - 2**-24, 1.0]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.9), (50, 0.9), (1, 1.0), (0, 1e-6)])
def test_extreme_uniforms_never_leave_the_candidates(top_k, top_p):
    """A CDF in float32 need not end at 1, so with a large vocabulary the last token could be chosen wrongly."""
    scores = 3 * torch.randn(50, 30_000, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(1, top_k=top_k, top_p=top_p)
    warped = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    for value in EXTREMES:
        tokens, _ = choose_tokens(scores, torch.full((50,), value), params)
        assert warped.gather(-1, tokens[:, None]).isfinite().all()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.99), (7, 0.5)])
def test_a_token_of_probability_zero_is_never_chosen(top_k, top_p):
    scores = [-np.inf, -200.0, -np.inf, 1.0, -np.inf, 1.5, -np.inf, -200.0, -np.inf]
    tokens, _ = choose(scores, EXTREMES, SamplingParams(1, top_k=top_k, top_p=top_p))
    assert set(tokens) <= {3, 5}


def test_u_walks_through_the_candidates_in_the_order_of_the_vocabulary():
    params = SamplingParams(1, top_k=3)
    tokens, _ = choose(np.log([0.4, 0.05, 0.3, 0.05, 0.2]), [0.0, 0.44, 0.45, 0.77, 0.78, 1 - 2**-24], params)
    assert tokens.tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("top_k, top_p, kept", [(3, 1.0, 3), (0, 0.5, 4), (0, 0.51, 5), (6, 0.5, 3), (0, 1.0, 8)])
def test_ties(top_k, top_p, kept):
    """Of equal scores exactly as many stay as the setting says, and each is equally likely."""
    tokens, _ = choose(np.zeros(8), (np.arange(600) + 0.5) / 600, SamplingParams(1, top_k=top_k, top_p=top_p))
    counts = np.bincount(tokens, minlength=8)
    assert sorted(counts) == pytest.approx([0] * (8 - kept) + [600 / kept] * kept, abs=1)


def test_greedy_is_the_best_token_scored_at_temperature_one():
    scores = [0.0, 2.0, 1.0]
    tokens, logps = choose(scores, [0.0, 0.999], SamplingParams(1, temperature=0.0))
    assert tokens.tolist() == [1, 1]
    np.testing.assert_allclose(logps, torch.log_softmax(torch.tensor(scores), dim=-1)[1], rtol=1e-6)


# ---- randomness belongs to the row ----


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_prompts_sampled_alone_give_what_they_give_in_a_batch(family):
    model, batch, uniforms = make_policy(family), make_batch(), draw_uniforms((0, 1), range(9), 20)
    together = sample(model, uniforms=uniforms)
    for i, (ids, mask) in enumerate(zip(batch.prompt_ids, batch.prompt_mask, strict=True)):
        rows = slice(GROUP * i, GROUP * (i + 1))
        expected = replace(
            together,
            completion_ids=together.completion_ids[rows],
            completion_mask=together.completion_mask[rows],
            sampler_logps=together.sampler_logps[rows],
        )
        assert_same(sample(model, prompts=(ids[None], mask[None]), uniforms=uniforms[rows]), expected)
        assert_same(sample(model, prompts=(ids[mask][None], mask[mask][None]), uniforms=uniforms[rows]), expected)


def test_rows_in_another_order_give_the_same_completions():
    model, batch, uniforms = make_policy(), make_batch(), draw_uniforms((0, 1), range(9), 20)
    together, order = sample(model, uniforms=uniforms), [2, 0, 1]
    rows = [GROUP * prompt + i for prompt in order for i in (1, 2, 0)]
    shuffled = sample(model, prompts=(batch.prompt_ids[order], batch.prompt_mask[order]), uniforms=uniforms[rows])
    assert torch.equal(shuffled.completion_ids, together.completion_ids[rows])


def test_the_completions_of_a_group_differ():
    ids = sample(make_policy(), eos=NEVER).completion_ids
    assert len(set(map(tuple, ids.tolist()))) == len(ids)


def test_uniforms_depend_on_seed_and_row_only():
    whole = draw_uniforms((3, 7), range(10), 50)
    assert whole.dtype == torch.float32 and whole.shape == (10, 50)
    assert torch.equal(draw_uniforms((3, 7), [8, 2, 5], 50), whole[[8, 2, 5]])
    assert torch.equal(draw_uniforms((3, 7), range(10), 20), whole[:, :20])


def test_uniforms_of_other_seeds_steps_and_rows_are_other_numbers():
    draws = torch.cat([draw_uniforms((seed, step), range(16), 8) for seed in range(4) for step in range(4)])
    assert len(set(draws.flatten().tolist())) > 0.99 * draws.numel()


def test_uniforms_are_uniform_and_below_one():
    draws = draw_uniforms((0, 0), range(200), 500)
    assert draws.min() >= 0 and draws.max() < 1
    shares = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
    assert (shares - 0.05).abs().max() < 0.005
    correlation = np.corrcoef(draws[:, :-1].flatten(), draws[:, 1:].flatten())[0, 1]
    assert abs(correlation) < 0.02


# ---- where a completion ends ----


def count_decode_steps(model, **options):
    """Return the rollout, and how often the decoder ran after the prompt."""
    calls = []
    hook = base_model(model).get_decoder().register_forward_hook(lambda *_: calls.append(1))
    rollout = sample(model, **options)
    hook.remove()
    return rollout, len(calls) - 1


@pytest.mark.parametrize("eos", [tuple(range(97)), tuple(range(60)), tuple(range(20)), SOME, NEVER])
@pytest.mark.parametrize("interval", [1, 4, 7, 100])
def test_sampling_stops_at_the_first_look_after_all_rows_have_ended(eos, interval):
    """With fixed shapes the sampler looks once in `interval` steps; where they follow the data, before each step."""
    model, room = make_policy(), PARAMS.max_new_tokens - 1
    rollout, steps = count_decode_steps(model, eos=eos)
    last_token = int(rollout.completion_mask.sum(-1).max()) - 1
    never_ended = (rollout.completion_mask[:, -1] & ~torch.isin(rollout.completion_ids[:, -1], torch.tensor(eos))).any()
    needed = room if never_ended else last_token
    assert steps == needed
    same, steps = count_decode_steps(model, eos=eos, interval=interval, static=True)
    assert steps == min(-(-max(needed, 1) // interval) * interval, room)
    assert_same(rollout, same)


@pytest.mark.parametrize("pad", [PAD, SOME[0], SOME[3]])
def test_a_completion_reaches_up_to_and_including_its_first_eos(pad):
    """Padding may itself be an end-of-sequence token; the completion's own one still stays in the mask."""
    model = make_policy()
    endless, rollout = sample(model, eos=NEVER), sample(model, pad=pad)
    lengths = []
    for full, ids, mask, logps in zip(
        endless.completion_ids.tolist(),
        rollout.completion_ids.tolist(),
        rollout.completion_mask.tolist(),
        rollout.sampler_logps,
        strict=True,
    ):
        ends = [i for i, token in enumerate(full) if token in SOME]
        length = ends[0] + 1 if ends else len(full)
        assert mask == [True] * length + [False] * (len(full) - length)
        assert ids == full[:length] + [pad] * (len(full) - length)
        assert logps[:length].all() and not logps[length:].any()
        lengths.append(length)
    assert min(lengths) < 10 < max(lengths) == 20, "rows that end and rows that don't"
    assert len({int(row[length - 1]) for row, length in zip(rollout.completion_ids, lengths, strict=True)}) > 2


def test_a_model_that_never_ends_fills_every_column():
    rollout = sample(make_policy(), eos=NEVER)
    assert rollout.completion_mask.all() and rollout.sampler_logps.all()
    assert rollout.completion_ids.shape == (9, 20)


def test_a_padding_token_that_the_model_itself_samples_does_not_end_a_completion():
    pad = int(sample(make_policy(), eos=NEVER).completion_ids[0, 5])
    assert sample(make_policy(), eos=NEVER, pad=pad).completion_mask.all()


def test_completions_of_one_token():
    for options in ({"interval": 1}, {"interval": 16}, {"static": True, "compile_ahead": True}):
        rollout = sample(make_policy(), params=replace(PARAMS, max_new_tokens=1), **options)
        assert rollout.completion_ids.shape == (9, 1) and rollout.completion_mask.all()


# ---- the sampler as an object ----


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_dropout_is_off_meanwhile(training):
    model = make_policy(lora_dropout=0.5).train(training)
    rollout = sample(model)
    assert all(module.training == training for module in model.modules())
    assert_same(rollout, sample(make_policy()))


def test_sampling_leaves_no_graph():
    assert not sample(make_policy()).sampler_logps.requires_grad


def test_a_sampler_used_again_gives_what_a_new_one_gives():
    """A sampler makes its decode step once, but must see other prompts, group sizes, settings and LoRA weights."""
    model, batch = make_policy(), make_batch()
    sampler = Sampler(model, SOME, PAD)
    uniforms = draw_uniforms((0, 1), range(9), 20)
    before = sampler.sample(batch.prompt_ids, batch.prompt_mask, GROUP, PARAMS, uniforms)
    assert_same(before, sample(model, uniforms=uniforms))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    for group, first, params in [(3, 0, PARAMS), (2, 0, PARAMS), (3, 4, PARAMS), (3, 0, replace(PARAMS, top_k=2))]:
        prompts = batch.prompt_ids[:, first:], batch.prompt_mask[:, first:]
        rows = uniforms[: 3 * group]
        again = sampler.sample(*prompts, group, params, rows)
        assert_same(again, sample(model, prompts=prompts, group=group, params=params, uniforms=rows))
        assert group != 3 or not torch.equal(again.completion_ids, before.completion_ids)


def test_uniforms_of_the_wrong_shape_are_refused():
    with pytest.raises(AssertionError):
        sample(make_policy(), uniforms=draw_uniforms((0, 1), range(8), 20))
