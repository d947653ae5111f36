import json
from dataclasses import asdict

import pytest

from data_prep.common.errors import UserError
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample
from data_prep.text.template import CHAT_FORMATS, Image, Order, Piece, Special, Template, Text
from data_prep.text.turns import Turns, excerpts

PICTURE = ImageRef("p", data=b"")
ASKED = Example("1", (Turn("user", (PICTURE, "what is it?")), Turn("assistant", ("a ring",))))
TWO_TURNS = Example("2", (*ASKED.turns, Turn("user", ("sure?",)), Turn("assistant", ("yes",))))
CAPTION = Example("3", (Turn("user", (PICTURE,)), Turn("assistant", ("a red ring",))), kind="document")


def spell(pieces: list[Piece]) -> str:
    """Readable form: <special>, [image], generated parts between braces."""
    out = []
    for piece in pieces:
        if isinstance(piece, Image):
            out.append(f"[{piece.index}]")
            continue
        words = piece.text if isinstance(piece, Text) else piece.token
        out.append("{" + words + "}" if piece.generated else words)
    return "".join(out)


GOLDEN = {
    "gemma": (
        "<bos><start_of_turn>user\nbe kind\n\n[0]\nwhat is it?<end_of_turn>\n"
        "<start_of_turn>model\n{a ring}{<end_of_turn>}\n<start_of_turn>user\nsure?<end_of_turn>\n"
        "<start_of_turn>model\n{yes}{<end_of_turn>}"
    ),
    "mistral": (
        "<s>[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT][INST][0]\nwhat is it?[/INST]{a ring}{</s>}"
        "[INST]sure?[/INST]{yes}{</s>}"
    ),
    "plain": (
        "<system>be kind<end><user>[0]what is it?<end><assistant>{a ring}{<end>}<user>sure?<end><assistant>{yes}{<end>}"
    ),
    "phi3": (
        "<|system|>\nbe kind<|end|>\n<|user|>\n[0]\nwhat is it?<|end|>\n<|assistant|>\n{a ring}{<|end|>}\n"
        "<|user|>\nsure?<|end|>\n<|assistant|>\n{yes}{<|end|>}"
    ),
    "qwen": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n[0]\nwhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n{a ring}{<|im_end|>}\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n{yes}{<|im_end|>}"
    ),
    "chatml": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n[0]\nwhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n{a ring}{<|im_end|>}\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n{yes}{<|im_end|>}"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n[0]\nwhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{a ring}{<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{yes}{<|eot_id|>}"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_is_written_as_its_model_family_does(name: str) -> None:
    assert spell(Template(name, system="be kind").pieces(TWO_TURNS)) == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name in CHAT_FORMATS if name != "caption"])
@pytest.mark.parametrize("system", ["", "be kind"])
def test_training_begins_with_the_prompt_of_inference(name: str, system: str) -> None:
    template = Template(name, system=system)
    whole, prompt = template.pieces(TWO_TURNS), template.prompt_pieces(TWO_TURNS.turns)
    assert whole[: len(prompt)] == prompt
    prefix = [Text(CHAT_FORMATS[name].answer_prefix, generated=True)] if CHAT_FORMATS[name].answer_prefix else []
    assert whole[len(prompt) :] == [*prefix, Text("yes", generated=True), Special(template.ends[0], generated=True)]
    assert template.prompt_pieces(TWO_TURNS.turns[:-1]) == prompt


@pytest.mark.parametrize(
    ("order", "asked"),
    [
        ("image_first", "<|user|>\n[0]\n[1]\nwhich is redder?"),
        ("text_first", "<|user|>\nwhich is redder?\n[0]\n[1]"),
        ("as_written", "<|user|>\nwhich[0] is redder?[1]"),
    ],
)
def test_the_order_of_images_and_text_is_a_setting(order: Order, asked: str) -> None:
    turn = Turn("user", ("which", PICTURE, " is redder?", PICTURE))
    assert spell(Template("phi3", order=order).prompt_pieces([turn])) == asked + "<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (("the dog in", "with the cat in", "please."), "the dog in with the cat in please."),
        (("the dog in ", " with the cat in ", " please."), "the dog in with the cat in please."),
        (("first\n", "\nsecond"), "first\nsecond"),
        (("", "only "), "only"),
    ],
)
def test_texts_around_images_are_not_glued_together(texts: tuple[str, ...], joined: str) -> None:
    turn = Turn("user", tuple(part for text in texts for part in (text, PICTURE)))
    asked = spell(Template("plain").prompt_pieces([turn]))
    assert asked == "<user>" + "".join(f"[{number}]" for number in range(len(texts))) + joined + "<end><assistant>"


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_caption_is_a_document_in_every_template(name: str) -> None:
    assert spell(Template(name).pieces(CAPTION)) == "[0]{a red ring}{<eos>}"
    assert spell(Template(name).pieces(CAPTION, "Look: ")) == "[0]Look: {a red ring}{<eos>}"


@pytest.mark.parametrize(
    ("order", "given"),
    [("image_first", [Image(0), Text("Look: ")]), ("text_first", [Text("Look: "), Image(0)])],
)
def test_the_caption_prompt_is_the_training_prefix(order: Order, given: list[Piece]) -> None:
    template = Template("caption", prompts=("Look: ", "See: "), order=order)
    prompt = template.prompt_pieces(CAPTION.turns)
    assert template.pieces(CAPTION, "Look: ")[: len(prompt)] == prompt == given


def test_only_documents_of_images_without_given_text_take_a_prompt() -> None:
    template = Template("plain", prompts=("Look: ",))
    titled = Example("5", (Turn("user", (PICTURE, "Title: ")), CAPTION.turns[1]), kind="document")
    text = Example("8", CAPTION.turns[1:], kind="document")
    assert [template.takes_prompt(example) for example in (CAPTION, titled, text, ASKED)] == [True, *[False] * 3]
    assert not Template("plain").takes_prompt(CAPTION)
    asked = Template("caption", prompts=("Look: ",)).prompt_pieces(titled.turns)
    assert asked == [Image(0), Text("Title: ")]
    assert Template("caption", prompts=("Look: ",)).prompt_pieces(text.turns) == []


LONG = Example(
    "6",
    (
        *(Turn("user", (PICTURE, "what is it?")), Turn("assistant", ("a ring",))),
        *(Turn("user", (PICTURE, "and this?")), Turn("assistant", ("a cone",))),
        *(Turn("user", ("both red?",)), Turn("assistant", ("yes",))),
    ),
)
"""Three turns, two images."""
EXCERPTS: dict[Turns, dict[str, str]] = {
    "every": {
        "6": "<user>[0]what is it?<end><assistant>{a ring}{<end>}<user>[1]and this?<end><assistant>{a cone}{<end>}"
        "<user>both red?<end><assistant>{yes}{<end>}"
    },
    "first": {"6": "<user>[0]what is it?<end><assistant>{a ring}{<end>}"},
    "expand": {
        "6#1": "<user>[0]what is it?<end><assistant>{a ring}{<end>}",
        "6#2": "<user>[0]what is it?<end><assistant>a ring<end><user>[1]and this?<end><assistant>{a cone}{<end>}",
        "6#3": "<user>[0]what is it?<end><assistant>a ring<end><user>[1]and this?<end><assistant>a cone<end>"
        "<user>both red?<end><assistant>{yes}{<end>}",
    },
}


@pytest.mark.parametrize("turns", EXCERPTS)
def test_what_a_conversation_becomes_is_a_setting(turns: Turns) -> None:
    template = Template("plain", turns=turns)
    found = list(excerpts(LONG, turns))
    assert {part.example.id: spell(template.pieces(part.example)) for part in found} == EXCERPTS[turns]
    assert [part.left_out for part in found] == ([2] if turns == "first" else [0] * len(found))
    assert [part.repeated for part in found] == ([0, 2, 4] if turns == "expand" else [0])


@pytest.mark.parametrize("turns", EXCERPTS)
@pytest.mark.parametrize("example", [CAPTION, Example("7", (Turn("user", ("hm",)),))], ids=["document", "no-answer"])
def test_an_example_without_turns_to_split_stays_whole(turns: Turns, example: Example) -> None:
    assert [part.example for part in excerpts(example, turns)] == [example]


@pytest.mark.parametrize("system", ["", "be kind"])
@pytest.mark.parametrize("name", GOLDEN)
def test_an_expanded_conversation_begins_with_the_prompt_of_inference(name: str, system: str) -> None:
    template = Template(name, system=system, turns="expand")
    for part in excerpts(LONG, "expand"):
        whole, prompt = template.pieces(part.example), template.prompt_pieces(part.example.turns)
        assert whole[: len(prompt)] == prompt
        assert not any(getattr(piece, "generated", False) for piece in prompt)
        assert all(getattr(piece, "generated", False) for piece in whole[len(prompt) :])


def test_settings_come_back_from_json() -> None:
    template = Template("phi3", system="be kind", prompts=("Look: ", "See: "), order="text_first", turns="expand")
    assert Template(**json.loads(json.dumps(asdict(template)))) == template


def test_a_conversation_keeps_its_own_system_turn() -> None:
    example = Example("4", (Turn("system", ("own",)), *ASKED.turns))
    assert spell(Template("plain", system="other").pieces(example)).startswith("<system>own<end><user>")


def test_a_template_refuses_what_it_cannot_write() -> None:
    with pytest.raises(BadSample, match="wrong-template"):
        Template("caption").pieces(ASKED)
    with pytest.raises(UserError, match="did you mean 'phi3'"):
        Template("phi")
    with pytest.raises(UserError, match="has no turns"):
        Template("caption", system="x")
    with pytest.raises(UserError, match="turns=expand cannot be used"):
        Template("caption", turns="expand")
    with pytest.raises(UserError, match="no given text to put first: set prompts"):
        Template("caption", order="text_first")
