"""MMA on stock vision-language classes: against dense masks, packed against alone, generation against training."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F

from data_prep.common.errors import UserError
from pipeline.hf import AssistantSpans, MMACallback, disable_mma, enable_mma
from pipeline.hf.mask import BACKENDS
from pipeline.masks import POLICIES, dense_mask, get_policy, position_ids
from pipeline.prober import assert_no_leak, probe
from tests.pipeline.hf.models import CLASSES, IMAGE_ID, VIDEO_ID, Rows, tiny

LAYOUTS = ("Q2 V4 Q3 A3 Q2 V4 Q1 A2", "V4 Q2 A3 | Q1 V4 Q2 A2 P3")
TIGHT = {"rtol": 1e-5, "atol": 1e-5}
NEW = 5
TRAINS_ON_CPU = ("sdpa", "runsplit")
"""FlexAttention has no backward pass on a CPU."""
HEADER, END = 33, 34


@pytest.fixture(scope="module", params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return tiny(name)


@pytest.fixture(autouse=True)
def off_again(model: Any) -> Any:
    yield
    disable_mma(model.eval())
    model.gradient_checkpointing_disable()


def gradients(model: Any, rows: Rows, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the rows, and the gradients of their loss by every trained parameter."""
    model.zero_grad()
    logits = model(**inputs).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.labels[:, 1:].flatten()).backward()
    return logits.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_logits_and_gradients_equal_a_dense_mask(model: Any, name: str) -> None:
    rows = Rows.of(name, *LAYOUTS)
    real, inputs = rows.segment > 0, rows.inputs(model)
    logits, exact = gradients(model, rows, **inputs, attention_mask=rows.dense("mma"))
    causal = model(**inputs, attention_mask=rows.dense("causal")).logits
    assert (causal - logits)[real].abs().max() > 1e-2
    for backend in TRAINS_ON_CPU:
        enable_mma(model, backend=backend)
        found, own = gradients(model, rows, **inputs, labels=rows.labels)
        torch.testing.assert_close(found[real], logits[real], **TIGHT)
        assert own.keys() == exact.keys()
        for key, gradient in own.items():
            torch.testing.assert_close(gradient, exact[key], **TIGHT, msg=lambda text, key=key: f"{key}: {text}")


def test_packed_samples_equal_samples_alone(model: Any, name: str) -> None:
    layouts = ("Q1 V4 Q2 A3", "V4 Q1 V4 Q2 A2 Q1 A2")
    packed = Rows.of(name, " | ".join(layouts))
    enable_mma(model)
    inputs = packed.inputs(model)
    logits = model(**inputs, labels=packed.labels).logits[0]
    start, first = 0, 0
    for layout in layouts:
        alone = Rows.of(name, layout)
        end, images = start + alone.ids.shape[1], int(alone.sidecars[0].instance.max()) + 1
        own = {
            "input_ids": inputs["input_ids"][:, start:end],
            "position_ids": inputs["position_ids"][..., start:end],
            "labels": packed.labels[:, start:end],
            **_images(inputs, first, first + images),
        }
        torch.testing.assert_close(model(**own).logits[0], logits[start:end], **TIGHT)
        start, first = end, first + images


def _images(inputs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        return {"pixel_values": pixels[first * 16 : last * 16], "image_grid_thw": inputs["image_grid_thw"][first:last]}
    if "image_sizes" in inputs:
        return {"pixel_values": pixels[first:last], "image_sizes": inputs["image_sizes"][first:last]}
    return {"pixel_values": pixels[:, first:last] if pixels.dim() == 5 else pixels[first:last]}


def test_generation_of_a_left_padded_batch_equals_teacher_forcing(model: Any, name: str) -> None:
    rows = Rows.of(name, "Q2 V4 Q3 A5", "V4 Q2 A8")
    enable_mma(model)
    prompts = rows.left_padded([9, 6])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
    options["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]
    done = model.generate(**prompts, **options, output_logits=True, return_dict_in_generate=True)
    new = done.sequences[:, -NEW:]
    for row, layout in enumerate((f"Q2 V4 Q3 A{NEW}", f"V4 Q2 A{NEW}")):
        alone = Rows.of(name, layout)
        length = alone.ids.shape[1] - NEW
        ids = torch.cat([rows.ids[row, :length], new[row]])[None]
        inputs = {**alone.inputs(model), "input_ids": ids, **_images(rows.inputs(model), row, row + 1)}
        if name in ("idefics3", "smolvlm"):
            inputs["pixel_values"] = rows.inputs(model)["pixel_values"][row : row + 1]
        forced = model(**inputs, labels=torch.where(alone.generated, ids, -100)).logits[0, length - 1 : -1]
        torch.testing.assert_close(torch.stack(done.logits, 1)[row].to(forced), forced, **TIGHT)


def test_disabled_models_equal_stock_models_to_the_bit(model: Any, name: str) -> None:
    rows = Rows.of(name, *LAYOUTS)
    inputs = rows.inputs(model)
    before = model(**inputs).logits
    config = model.config.to_dict()
    enable_mma(enable_mma(model))
    assert not model(**inputs, labels=rows.labels).logits.equal(before)
    disable_mma(disable_mma(model))
    assert model(**inputs).logits.equal(before)
    assert model.config.to_dict() == config


def test_gradient_checkpointing_recomputes_under_the_same_mask(model: Any, name: str) -> None:
    rows = Rows.of(name, *LAYOUTS)
    enable_mma(model)
    model.train()
    inputs = {**rows.inputs(model), "labels": rows.labels}
    logits, plain = gradients(model, rows, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = gradients(model, rows, **inputs)
    assert again.equal(logits)
    for key, gradient in recomputed.items():
        torch.testing.assert_close(gradient, plain[key], **TIGHT)


def test_the_prober_finds_nothing(model: Any, name: str) -> None:
    rows = Rows.of(name, "Q2 V4 Q3 A3 Q2 A2 | V4 Q2 A3")
    enable_mma(model, assistant_spans=AssistantSpans(start=(HEADER,), end=(END,)))
    ids = rows.with_spans(HEADER, END)
    batch = {**rows.inputs(model), "input_ids": ids, "labels": torch.where(rows.generated, ids, -100)}
    if name.startswith("qwen"):
        batch["mm_token_type_ids"] = (rows.ids == IMAGE_ID).long()
    assert_no_leak(model, batch)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.needs_grid])
def test_every_policy_without_a_grid(model: Any, name: str, policy: str) -> None:
    rows = Rows.of(name, "Q2 V4 V4 Q3 A3 Q2 V4 Q1 A2", "V4 Q2 A3 | Q1 V4 Q2 A2 P7")
    real, inputs = rows.segment > 0, rows.inputs(model)
    leaks = POLICIES[policy].leaks
    oracle = torch.stack([_dense(policy, row) for row in rows.sidecars])[:, None]
    exact = model(**inputs, attention_mask=oracle).logits
    for backend in BACKENDS:
        enable_mma(model, policy, backend=backend, allow_leak=leaks)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, labels=rows.labels).logits[real], exact[real], **TIGHT)
    enable_mma(model, policy, allow_leak=leaks)
    found = {finding.check for finding in probe(model, [{**inputs, "labels": rows.labels}]).findings}
    assert ("answer leak" in found) == leaks


def _dense(policy: str, row: Any) -> torch.Tensor:
    return dense_mask(get_policy(policy, allow_leak=True), row)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_ways_to_say_what_belongs_together_and_what_is_an_answer(model: Any, name: str) -> None:
    rows = Rows.of(name, "V4 Q2 A3 | Q1 V4 Q2 A2 P3")
    real, inputs = rows.segment > 0, rows.inputs(model)
    enable_mma(model)
    exact = model(**inputs, labels=rows.labels).logits[real]
    explicit = model(**inputs, generated=rows.generated, segment=rows.segment).logits[real]
    numbered = model(**inputs, generated=rows.generated, attention_mask=rows.segment).logits[real]
    assert explicit.equal(exact)
    assert numbered.equal(exact)
    ids = rows.with_spans(HEADER, END)
    labels = torch.where(rows.generated, ids, -100)
    spans = AssistantSpans(start=(HEADER,), end=(END,))
    by_labels = model(**{**inputs, "input_ids": ids}, labels=labels).logits[real]
    enable_mma(model, assistant_spans=spans)
    assert model(**{**inputs, "input_ids": ids}).logits[real].equal(by_labels)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_a_chat_continues_on_its_cache(model: Any, name: str) -> None:
    """The second turn's prompt goes into the cache in one pass; its logits are those of the whole conversation."""
    rows = Rows.of(name, "V4 Q2 A3 Q1 V4 Q2 A1")
    enable_mma(model)
    inputs = {**rows.inputs(model), "labels": rows.labels}
    exact = model(**inputs).logits
    cut, pixels = [6, 7, 8, 9, 16, 17], inputs["pixel_values"]
    cache, found = None, []
    for start, end in zip([0, *cut], cut, strict=False):
        image = pixels[:1] if start == 0 else pixels[1:] if end == 16 else None
        out = model(
            input_ids=rows.ids[:, start:end], pixel_values=image, past_key_values=cache, use_cache=True,
            position_ids=inputs["position_ids"][:, start:end],
        )  # fmt: skip
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), exact, **TIGHT)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_mistakes_are_named(model: Any, name: str) -> None:
    rows = Rows.of(name, "V4 Q2 A3")
    inputs = rows.inputs(model)
    for policy, options, message in (
        ("mmma", {}, "unknown mask policy 'mmma'"),
        ("mma+0:1=mixed", {}, "changes with the layer"),
        ("image_to_answer", {}, "set allow_leak"),
        ("cca", {}, "orders image tokens by their place in the image"),
        ("mma", {"backend": "flash"}, "unknown backend 'flash'"),
        ("cca", {"backend": "flex", "grid": (2, 2)}, "backend 'flex' cannot reorder tokens"),
    ):
        with pytest.raises(UserError, match=message):
            enable_mma(model, policy, **options)
    enable_mma(model, assistant_spans=AssistantSpans(start=(39,), end=(2,)))
    with pytest.raises(UserError, match=r"labels train token 6 of row 0, which counts as given"):
        model(**inputs, labels=rows.labels)
    enable_mma(model)
    with pytest.raises(UserError, match="call the enabled model itself"):
        model.model(**inputs)
    with pytest.raises(UserError, match="not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 9, 32, dtype=torch.float64))
    with pytest.raises(UserError, match="without a static cache"):
        model.generate(
            input_ids=rows.ids[:, 4:6], cache_implementation="static", max_new_tokens=2, disable_compile=True
        )
    with pytest.raises(UserError, match="or generate with a cache"):
        model.generate(input_ids=rows.ids[:, 4:6], max_new_tokens=2, use_cache=False)
    for mask, kind in ((rows.dense("causal"), "a mask of 4 dimensions"), ({"full_attention": None}, "a dict")):
        with pytest.raises(UserError, match=f"attention_mask is {kind}, which would replace the mask of the policy"):
            model(**inputs, attention_mask=mask, labels=rows.labels)
    first = model(input_ids=rows.ids[:, :5], pixel_values=inputs["pixel_values"], use_cache=True)
    with pytest.raises(UserError, match="a prompt was split over two forward passes"):
        model(input_ids=rows.ids[:, 5:9], past_key_values=first.past_key_values)
    model.train()
    with pytest.raises(UserError, match="pass labels"):
        model(**inputs)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_the_callback_enables_the_trainers_model(model: Any, name: str) -> None:
    rows = Rows.of(name, *LAYOUTS)
    inputs = {**rows.inputs(model), "labels": rows.labels}
    expected = enable_mma(model, "mixed")(**inputs).logits
    disable_mma(model)
    MMACallback("mixed", backend="sdpa").on_train_begin(None, None, None, model=model)
    assert model(**inputs).logits.equal(expected)


def adapted(name: str) -> Any:
    """The same model with a LoRA adapter, which starts as zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny(name), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_labels_on_every_token_are_reported(model: Any, name: str) -> None:
    """Then nothing is given, and MMA would train the causal model without a word."""
    rows = Rows.of(name, "V4 Q2 A3")
    inputs, everything = rows.inputs(model), torch.where(rows.ids == IMAGE_ID, -100, rows.ids)
    enable_mma(model.train())
    with pytest.warns(UserWarning, match="is the causal mask in this batch: no question follows an image"):
        model(**inputs, labels=everything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=everything)  # once is enough
        enable_mma(model)(**inputs, labels=rows.labels)
        enable_mma(model, "mixed")(**inputs, labels=everything)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "peft"])
def test_a_hook_that_embeds_the_ids_before_the_forward(model: Any, name: str, wrap: bool) -> None:
    """As ms-swift's templates do, on the outermost module; MMA reads the ids before other hooks see them."""
    rows = Rows.of(name, "V4 Q2 A3")
    inputs = {**rows.inputs(model), "labels": rows.labels}
    expected = enable_mma(model)(**inputs).logits
    disable_mma(model)
    trained = adapted(name) if wrap else model

    def embed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids, pixels = kwargs.pop("input_ids"), kwargs.pop("pixel_values")
        embeddings = model.get_input_embeddings()(ids)
        features = torch.cat(list(model.get_image_features(pixels).pooler_output))
        embeddings = embeddings.masked_scatter((ids == IMAGE_ID)[..., None], features)
        return args, {**kwargs, "inputs_embeds": embeddings}

    handle = trained.register_forward_pre_hook(embed, with_kwargs=True)
    try:
        torch.testing.assert_close(enable_mma(trained)(**inputs).logits, expected, **TIGHT)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_an_adapter_of_peft_trains_and_generates(model: Any, name: str) -> None:
    rows = Rows.of(name, *LAYOUTS)
    inputs = {**rows.inputs(model), "labels": rows.labels}
    expected = enable_mma(model)(**inputs)
    disable_mma(model)
    trained = adapted(name)
    assert enable_mma(trained) is trained
    found = trained(**inputs)
    assert found.logits.equal(expected.logits)  # an adapter starts as zero
    found.loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.parameters())
    with pytest.raises(UserError, match="not inputs_embeds"):
        trained(inputs_embeds=torch.zeros(1, 9, 32, dtype=torch.float64))
    assert trained(**inputs).logits.equal(expected.logits)  # nothing is left of the failed call
    prompt = Rows.of(name, "Q2 V4 Q3 A5").left_padded([9])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ids = trained.eval().generate(**prompt, **options)
    assert ids.equal(enable_mma(model).generate(**prompt, **options))
    assert not disable_mma(trained)(**inputs).logits.equal(found.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_a_compiled_model_equals_itself(model: Any, name: str) -> None:
    """Also on a second layout of the same shape: the mask is no constant of the graph."""
    enable_mma(model)
    compiled: Any = torch.compile(model, backend="eager")
    for layout in ("Q2 V4 Q3 A3 Q2 V4 Q1 A2", "V4 Q4 A5 Q2 V4 A1 P1"):
        rows = Rows.of(name, layout)
        inputs = {**rows.inputs(model), "labels": rows.labels}
        _, expected = gradients(model, rows, **inputs)
        logits, found = gradients(compiled, rows, **inputs)
        assert logits.equal(model(**inputs).logits)
        assert all(gradient.equal(expected[key.removeprefix("_orig_mod.")]) for key, gradient in found.items())


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_concentric_attention_keeps_its_positions_in_training_and_decoding(model: Any, name: str) -> None:
    grid = (2, 2)
    policy = get_policy("cca", grid=grid)
    rows = Rows.of(name, "Q2 V4 V4 Q3 A3 Q2 V4 Q1 A2", "V4 Q2 A3 | Q1 V4 Q2 A2 P7")
    oracle = {
        "attention_mask": torch.stack([dense_mask(policy, row) for row in rows.sidecars])[:, None],
        "position_ids": torch.stack([position_ids(row, grid) for row in rows.sidecars]),
    }
    exact = model(**{**rows.inputs(model), **oracle}).logits
    for backend in TRAINS_ON_CPU:
        enable_mma(model, "cca", grid=grid, backend=backend)
        found = model(**rows.inputs(model), labels=rows.labels).logits
        torch.testing.assert_close(found[rows.segment > 0], exact[rows.segment > 0], **TIGHT)
    prompts = Rows.of(name, "Q2 V4 Q3 A5", "V4 Q2 A8")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
    given = prompts.left_padded([9, 6])
    options |= {"suppress_tokens": [IMAGE_ID], "output_logits": True, "return_dict_in_generate": True}
    done = model.generate(**given, **options)
    ids = done.sequences
    mask = F.pad(given["attention_mask"], (0, NEW), value=1)
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - NEW, ids, -100)
    forced = model(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"], labels=labels).logits
    torch.testing.assert_close(torch.stack(done.logits, 1).to(forced), forced[:, -NEW - 1 : -1], **TIGHT)
    disable_mma(model)
    causal = model(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"]).logits
    assert (causal - forced)[:, -NEW:].abs().max() > 1e-2
