import pytest

from data_prep.errors import UserError
from data_prep.example import Example, ImageRef, Turn
from data_prep.quarantine import BadSample
from data_prep.template import DIALECTS, Image, Order, Piece, Special, Template, Text

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


@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "caption"])
@pytest.mark.parametrize("system", ["", "be kind"])
def test_training_begins_with_the_prompt_of_inference(name: str, system: str) -> None:
    template = Template(name, system=system)
    whole, prompt = template.pieces(TWO_TURNS), template.prompt_pieces(TWO_TURNS.turns)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [Text("yes", generated=True), Special(template.ends[0], generated=True)]
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


@pytest.mark.parametrize("name", DIALECTS)
def test_a_caption_is_a_document_in_every_template(name: str) -> None:
    assert spell(Template(name).pieces(CAPTION)) == "[0]{a red ring}{<eos>}"
    assert spell(Template(name, prompt="Look: ").pieces(CAPTION)) == "[0]Look: {a red ring}{<eos>}"


def test_the_caption_prompt_is_the_training_prefix() -> None:
    template = Template("caption", prompt="Look: ")
    prompt = template.prompt_pieces(CAPTION.turns)
    assert template.pieces(CAPTION)[: len(prompt)] == prompt == [Image(0), Text("Look: ")]


def test_a_conversation_that_brings_a_system_turn_keeps_it() -> None:
    example = Example("4", (Turn("system", ("own",)), *ASKED.turns))
    assert spell(Template("plain", system="other").pieces(example)).startswith("<system>own<end><user>")


def test_what_a_template_cannot_write_is_refused() -> None:
    with pytest.raises(BadSample, match="wrong-template"):
        Template("caption").pieces(ASKED)
    with pytest.raises(UserError, match="did you mean 'phi3'"):
        Template("phi")
    with pytest.raises(UserError, match="has no turns"):
        Template("caption", system="x")
