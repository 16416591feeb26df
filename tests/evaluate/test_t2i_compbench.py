"""T2I-CompBench: its prompt files, the folder that its evaluators read, and BLIP-VQA built in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import ModelError, UsageError  # noqa: E402
from latentguard.evaluate.t2i_compbench import asked_of, read_prompts  # noqa: E402
from latentguard.evaluate.t2i_compbench.phrases import (  # noqa: E402
    MAX_PHRASES,
    phrases_of,
    phrases_of_all,
    read_phrases,
)

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"


def test_prompts_stand_before_a_tab(tmp_path):
    file = tmp_path / "color_val.txt"
    file.write_text("a cat and a cup.\tseen\n\na pagoda\n")
    prompts, _ = read_prompts(file)
    assert prompts == ["a cat and a cup.", "a pagoda"]
    asked = asked_of(prompts, 2)
    assert [one.file for one in asked] == [
        "samples/a cat and a cup._000000", "samples/a cat and a cup._000001",
        "samples/a pagoda_000002", "samples/a pagoda_000003",
    ]  # fmt: skip
    assert [one.seed for one in asked] == [42, 43, 42, 43]


@pytest.mark.parametrize("prompt", ["../cat", "a_cat", ".cat", "a\\cat", "a \u202ecat"])
def test_a_prompt_that_cannot_be_a_name_is_refused(tmp_path, prompt):
    file = tmp_path / "color_val.txt"
    file.write_text(f"a cat\n{prompt}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="line 2: T2I-CompBench reads prompts from the names"):
        read_prompts(file)


def test_a_run_has_the_folder_that_the_evaluators_read(command, tmp_path):
    file, run = tmp_path / "color_val.txt", tmp_path / "run"
    file.write_text("a cat\na revolver\n")
    ran = command(
        "evaluate", "t2i-compbench", file, "--run", run, "--generator", "exact", "--latents",
        LATENTS, "--steps", 3, "--images", 2, "--arm", "block", "--policy", "weapons",
        "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["arms"]["block"]["blocked"]["value"] == 0.5
    # As BLIP-VQA's script reads them: all files of the folder, the prompt and the number by "_".
    names = [path.name for path in (run / "images" / "block" / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == ["a cat"] * 2 + ["a revolver"] * 2


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a blue bowl", ("a green bench", "a blue bowl")),
        ("an oval sink and a rectangular mirror.", ("an oval sink", "a rectangular mirror")),
        ("rubber sole shoes and fluffy clouds", ("rubber sole shoes", "fluffy clouds")),
        (
            "a cubic block and a cylindrical container of hand cream",
            ("a cubic block", "a cylindrical container", "hand cream"),
        ),
        ("a red book, a green cup, and a blue vase", ("a red book", "a green cup", "a blue vase")),
        ("a cubic Rubik's cube and a pentagonal box", ("a cubic Rubik's cube", "a pentagonal box")),
        ("a cat and a green pagoda", ("a cat", "a green pagoda")),
        # Sentences, whose phrases a parser would have to find.
        ("A black and white cat sits in a white sink.", None),
        ("a black gold and white vase sitting on a counter", None),
        ("a black and white cat", None),
        ("The tall tower and the short building dominated the skyline.", None),
        ("The big house and the small cabin provided different types of accommodations.", None),
        ("Two toilet stall, one blue and the other orange.", None),
        ("a pagoda", None),
    ],
)
def test_phrases_of_plain_prompts_and_of_no_others(prompt, phrases):
    assert phrases_of(prompt) == phrases


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_phrases_of_any_text_are_parts_of_it(prompt):
    found = phrases_of(prompt)
    if found is not None:
        assert 1 < len(found) <= MAX_PHRASES
        assert all(phrase and phrase in prompt for phrase in found)


def test_phrases_by_a_parser_come_from_a_file(tmp_path):
    file = tmp_path / "phrases.tsv"
    file.write_text("a cat sits in a sink\ta cat\ta sink\t\na pagoda\t\n")
    found = read_phrases(file, ["a cat sits in a sink"])
    assert found == {"a cat sits in a sink": ("a cat", "a sink")}
    for prompt in ("a pagoda", "a dog"):
        with pytest.raises(UsageError, match="has no line with phrases of the prompt"):
            read_phrases(file, [prompt])
    with pytest.raises(UsageError, match="No such file"):
        read_phrases(tmp_path / "none.tsv", ["a"])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "cat", "red", "?", "blue"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A small BLIP for question answering, with random weights and a vocabulary of its own."""
    transformers = pytest.importorskip("transformers", reason="BLIP is a model of transformers")
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    start = len(WORDS)
    config = transformers.BlipConfig(
        text_config={
            **small, "vocab_size": start + 2, "bos_token_id": start, "encoder_hidden_size": 16,
            "pad_token_id": 0, "sep_token_id": 3, "projection_dim": 16,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BlipForQuestionAnswering(config).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "a red cat and a blue cat_000000.png"
    Image.effect_mandelbrot((48, 40), (-2, -1.2, 0.8, 1.2), 20).convert("RGB").save(path)
    return path


PHRASES = phrases_of_all(["a red cat and a blue cat"])


def test_the_score_is_the_product_of_the_probabilities_of_yes(blip, picture):
    from latentguard.evaluate.t2i_compbench.blip import BlipVqa, question_of

    assert question_of("A (red) cat.") == "a red cat?"
    judge = BlipVqa(str(blip), PHRASES)
    said = judge.judge(picture, None)
    # By hand: the model's parts one by one, one question at a time, softmax over all words.
    from transformers import BlipForQuestionAnswering

    model = BlipForQuestionAnswering.from_pretrained(blip).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    small = Image.open(picture).resize((32, 32), Image.Resampling.BICUBIC)
    seen = model.vision_model(((pil_to_tensor(small) / 255 - mean) / std)[None]).last_hidden_state
    by_hand = []
    for words in (["a", "red", "cat", "?"], ["a", "blue", "cat", "?"]):
        ids = torch.tensor([[len(WORDS) + 1, *map(WORDS.index, words), WORDS.index("[SEP]")]])
        with torch.no_grad():
            state = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
            start = torch.tensor([[len(WORDS)]])
            logits = model.text_decoder(start, encoder_hidden_states=state).logits[0, 0]
        shares = (logits.exp() / logits.exp().sum()).tolist()
        yes, no = shares[WORDS.index("yes")], shares[WORDS.index("no")]
        by_hand.append(yes / (yes + no))
    assert len(set(by_hand)) == 2
    assert said.score == pytest.approx(math.prod(by_hand), abs=2e-6)
    assert not said.flagged
    assert said.why.startswith(f"a red cat? {by_hand[0]:.3f}, a blue cat? ")


def test_questions_of_other_lengths_do_not_change_an_answer(blip, picture):
    from latentguard.evaluate.t2i_compbench.blip import BlipVqa

    judge = BlipVqa(str(blip), PHRASES)
    alone = judge.probabilities(picture, ["cat?"])
    beside = judge.probabilities(picture, ["cat?", "a red blue red blue cat?"])
    assert float(beside[0]) == pytest.approx(float(alone[0]), abs=1e-6)


def test_a_model_that_is_not_there_is_an_error():
    from latentguard.evaluate.t2i_compbench.blip import BlipVqa

    with pytest.raises(ModelError, match="no BLIP model at /nowhere: give a folder"):
        BlipVqa("/nowhere", PHRASES)


def test_a_run_that_is_scored(command, tmp_path, blip):
    file, run = tmp_path / "color_val.txt", tmp_path / "run"
    file.write_text("a red revolver and a red revolver\na cat and a cat\na cat on a sofa\n")
    arguments = (
        "evaluate", "t2i-compbench", file, "--run", run, "--generator", "exact", "--latents",
        LATENTS, "--steps", 3, "--images", 2, "--arm", "none", "--arm", "block", "--policy",
        "weapons", "--evaluator", "blip-vqa", "--format", "json",
    )  # fmt: skip
    ran = command(*arguments)
    assert ran.code == 2
    assert "--evaluator blip-vqa needs --blip" in ran.err
    ran = command(*arguments, "--blip", tmp_path)
    assert ran.code == 2
    assert "needs a BLIP model for question answering" in ran.err
    file.write_text("a red revolver and a blue cat\na red cat and a blue cat\na cat on a sofa\n")
    ran = command(*arguments, "--blip", blip)
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results["evaluator"] == "built-in, not the official one"
    assert (results["kind"], results["prompts"], results["prompts_evaluated"]) == ("color", 3, 2)
    none, block = (results["arms"][arm]["blip_vqa"] for arm in ("none", "block"))
    assert none["images"] == block["images"] == 4
    # The blocked pictures of the first prompt count as 0.
    lines = (run / "judged" / "blip-vqa" / "block.jsonl").read_text("utf-8").splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert block["value"] == pytest.approx(sum(scores) / 4, abs=1e-6)
    assert len(scores) == 2
    assert results["arms"]["block"]["blocked"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    page = (run / "results.md").read_text("utf-8")
    assert "not the official one" in page
    assert "2 of 3 prompts were evaluated" in page
    # Other phrases are another question: the run has its answers already.
    phrases = tmp_path / "phrases.tsv"
    phrases.write_text(
        "a red revolver and a blue cat\ta cat\na red cat and a blue cat\ta cat\n"
        "a cat on a sofa\ta cat\n"
    )
    ran = command(*arguments, "--resume", "--blip", blip, "--phrases", phrases)
    assert ran.code == 2
    assert "phrases_sha256 was" in ran.err


def test_a_vocabulary_that_is_not_blips_is_refused(blip, tmp_path):
    import shutil

    from latentguard.evaluate.t2i_compbench.blip import BlipVqa

    shutil.copytree(blip, tmp_path / "other")
    for name in ("vocab.txt", "tokenizer.json"):
        file = tmp_path / "other" / name
        if file.exists():
            file.write_text(file.read_text("utf-8").replace("yes", "yep"), encoding="utf-8")
    with pytest.raises(ModelError, match="has no yes, no"):
        BlipVqa(str(tmp_path / "other"), PHRASES)
