"""Published hazard schemes: their files, and what a policy may say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import PolicyError
from latentguard.policy import json_schema, load_policy, parse_policy, schemes, shipped_policies
from latentguard.policy.problems import validate
from latentguard.policy.taxonomies import Scheme
from latentguard.yaml_nodes import compose

POLICY = """\
schema_version: 1
name: made
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {probability: 0.5}
    action: block
    taxonomy:
"""
SCHEME = """\
schema_version: 1
name: made
title: Made
version: "1"
source: https://example.org
"""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "taxonomies.md"


def test_each_scheme_says_what_it_is_and_where_it_is_from() -> None:
    assert list(schemes()) == ["azure", "mlcommons", "openai", "rekognition"]
    for name, scheme in schemes().items():
        assert scheme.name == name
        assert scheme.source.startswith("https://")
        assert scheme.source in DOCS.read_text("utf-8")
        assert scheme.version in DOCS.read_text("utf-8")


def test_the_numbers_of_categories() -> None:
    counts = {name: len(scheme.categories) for name, scheme in schemes().items()}
    assert counts == {"azure": 4, "mlcommons": 14, "openai": 13, "rekognition": 52}


def test_openai_s_categories_are_those_of_its_own_client() -> None:
    types = pytest.importorskip("openai.types.moderation", reason="compares with the client")
    fields = types.Categories.model_fields
    theirs = {field.alias or name for name, field in fields.items()}
    assert {category.id for category in schemes()["openai"].categories} == theirs


BAD = {
    "mlcomons: [vcr]": "12: concepts[0].taxonomy.mlcomons is not a known taxonomy; did you mean "
    "'mlcommons'?",
    "who: [vcr]": "12: concepts[0].taxonomy.who is not a known taxonomy; known are azure, "
    "mlcommons, openai, rekognition",
    "azure:\n        - Violnce": "13: concepts[0].taxonomy.azure[0] is no category of Azure AI "
    "Content Safety harm categories 2024-09-01, got 'Violnce'; did you mean 'Violence'?",
    "mlcommons: [Violent Crime]": "12: concepts[0].taxonomy.mlcommons[0] is no category of "
    "MLCommons AILuminate hazards 1.0, got 'Violent Crime'; did you mean 'vcr'?",
    "rekognition: [7]": "12: concepts[0].taxonomy.rekognition[0] is no category of Amazon "
    "Rekognition moderation labels 7.0, got 7; taxonomies/rekognition.yaml lists all 52",
    "azure: Violence": "12: concepts[0].taxonomy.azure must be a list of categories, not empty, "
    "got 'Violence'",
    "azure: []": "12: concepts[0].taxonomy.azure must be a list of categories, not empty, got []",
    "azure: [Hate, Hate]": "12: concepts[0].taxonomy.azure[1] stands twice ('Hate')",
    "[]": "10: concepts[0].taxonomy must be a mapping of schemes to lists of categories, got []",
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_unknown_is_one_sentence_with_line_key_and_nearest_name(said: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy(POLICY + "\n      " + said, "my.yaml")
    assert error.value.errors == (f"my.yaml:{BAD[said]}",)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda part: st.lists(part) | st.dictionaries(st.text() | st.sampled_from(["azure"]), part),
        max_leaves=6,
    )
)
@settings(max_examples=200, deadline=None)
def test_whatever_else_stands_there_is_one_policy_error(value: Any) -> None:
    if value == {}:
        return
    with pytest.raises(PolicyError) as error:
        parse_policy(POLICY.rstrip("\n") + " " + json.dumps(value))
    assert len(error.value.errors) == 1


def test_a_policy_carries_the_schemes_that_it_uses() -> None:
    data = parse_policy(POLICY + "      azure: [Violence]\n      mlcommons: [vcr, hte]").to_dict()
    assert data["concepts"][0]["taxonomy"] == {"azure": ["Violence"], "mlcommons": ["vcr", "hte"]}
    assert list(data["taxonomies"]) == ["azure", "mlcommons"]
    assert data["taxonomies"]["azure"]["severities"] == {
        "low": 2,
        "medium": 4,
        "high": 6,
        "critical": 6,
    }
    names = {c["id"]: c["name"] for c in data["taxonomies"]["mlcommons"]["categories"]}
    assert names["vcr"] == "Violent Crimes"
    assert json.loads(json.dumps(data)) == data


def test_prompts_keep_their_digest_where_a_mapping_is_added() -> None:
    """A lock's margins belong to prompts; a mapping changes none."""
    plain = parse_policy(POLICY.replace("    taxonomy:\n", ""))
    mapped = parse_policy(POLICY + "      azure: [Violence]")
    assert plain.prompts_sha256(plain.concepts[0]) == mapped.prompts_sha256(mapped.concepts[0])
    assert plain.sha256 != mapped.sha256


def test_editors_know_every_category() -> None:
    schema = json_schema()["$defs"]["Concept"]["properties"]["taxonomy"]
    assert schema["additionalProperties"] is False
    for name, scheme in schemes().items():
        assert schema["properties"][name]["items"]["enum"] == [c.id for c in scheme.categories]


@pytest.mark.parametrize(
    ("categories", "says"),
    [
        ("[{id: a}, {id: a}]", "categories[1].id must be unique, 'a' stands before"),
        ("[{id: a, parent: b}, {id: b}]", "categories[0].parent must stand before, got 'b'"),
        ("[{id: a, parent: a}]", "categories[0].parent must stand before, got 'a'"),
        ("[]", "categories must not be empty"),
        ("[{id: a, label: b}]", "categories[0].label is not a known key"),
    ],
)
def test_a_scheme_that_is_none(categories: str, says: str) -> None:
    node = compose(f"{SCHEME}categories: {categories}\n".encode(), "made.yaml")
    with pytest.raises(PolicyError, match=r"made\.yaml:6: ") as error:
        validate(Scheme, node, "made.yaml", "a taxonomy")
    assert says in str(error.value)


def test_what_the_shipped_policies_are_mapped_to_stands_in_the_documentation() -> None:
    text = DOCS.read_text("utf-8")
    for name in shipped_policies():
        for concept in load_policy(name).concepts:
            row = next(
                line
                for line in text.splitlines()
                if line.startswith("| ")
                and f"`{concept.id}`" in line.split("|")[1]
                and f"`{name}`" in line.split("|")[2]
            )
            cells = dict(
                zip(
                    ("mlcommons", "openai", "azure", "rekognition"),
                    (cell.strip() for cell in row.split("|")[3:7]),
                    strict=True,
                )
            )
            told = {key: cell.split("; ") for key, cell in cells.items() if cell != "-"}
            assert told == {key: list(found) for key, found in concept.taxonomy.items()}, concept.id
