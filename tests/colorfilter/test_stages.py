import pytest

from colorfilter.stages import ArtifactName, ShardKind, Stage


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("score_tables", ArtifactName(Stage.SCORE_TABLES)),
        ("raw_corpus[web-1]", ArtifactName(Stage.RAW_CORPUS, partition="web-1")),
        ("books/domain_text", ArtifactName(Stage.DOMAIN_TEXT, "books")),
        ("books/random/selection", ArtifactName(Stage.SELECTION, "books", "random")),
        (
            "books/random/filtered_dataset/tokens",
            ArtifactName(Stage.FILTERED_DATASET, "books", "random", "tokens"),
        ),
        (
            "books/color_tau16/target_model[seed_1]",
            ArtifactName(Stage.TARGET_MODEL, "books", "color_tau16", partition="seed_1"),
        ),
    ],
)
def test_a_name_says_stage_domain_arm_part_and_partition(
    name: str, components: ArtifactName
) -> None:
    assert ArtifactName.parse(name) == components


@pytest.mark.parametrize("name", ["", "books", "a/b/c/report", "report[", "nothing/of/it"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of an artifact"):
        ArtifactName.parse(name)


def test_shards_are_of_the_corpus_unless_their_name_is_reserved() -> None:
    assert ShardKind.of("web-5b79b34b0a") is ShardKind.CORPUS
    assert ShardKind.of("probe_of_mine-1") is ShardKind.CORPUS
    for kind in (ShardKind.PROBE, ShardKind.DRAWN):
        assert ShardKind.of(kind.named("books")) is kind
    assert ShardKind.PROBE.named("books") == "_probe_books"
    assert ShardKind.DRAWN.named("books") == "_dsir_books"
