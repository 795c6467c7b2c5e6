"""One list of features: every command takes the same names, and a name, its folder and its figures belong together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ambient_sd.audit.features import Pixels, Sscd
from ambient_sd.audit.registry import DEFAULT, NAMES, WEIGHTS, FeatureOptions, choose, label, labels
from ambient_sd.utils.errors import UserError
from ambient_sd.utils.settings import Parser, add_flags, from_flags


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).mean(dim=(2, 3))


def read(*words: str) -> tuple[list[str], dict[str, str | None]]:
    parser = Parser()
    add_flags(parser, FeatureOptions)
    return from_flags(FeatureOptions, parser.parse_args(words)).chosen()


def test_every_label_is_the_name_of_the_feature_that_is_made_and_names_it_too(tmp_path: Path) -> None:
    torch.jit.script(Mean()).save(str(tmp_path / "inception.pt"))
    names = [
        name
        for name in (*NAMES, "pixels8", "pixels8-standardized", "edges32")
        if "dinov2" not in name and name != "sscd-wen"
    ]
    if Sscd._find() is None:
        names = [name for name in names if "sscd" not in name]
    made = choose(names, {"inception": str(tmp_path / "inception.pt")})
    assert [feature.name for feature in made] == labels(names)
    assert [label(feature.name) for feature in made] == labels(names)  # what audit.json and folders say is a name
    assert label("dinov2") == "DINOv2"  # of which tests/audit/test_networks.py makes one


def test_sides_and_tones_of_pixels_are_read() -> None:
    plain, standardized = choose(["pixels8", "PIXELS16-standardized"])
    assert isinstance(plain, Pixels) and (plain.size, plain.standardized) == (8, False)
    assert isinstance(standardized, Pixels) and (standardized.size, standardized.standardized) == (16, True)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["pixel"],
            "there are pixels, standardized, edges, efflite0, sscd, sscd-wen, sscd-han, dinov2, dinov2-paper, inception",
        ),
        (["pixels0"], "feature 'pixels0'"),
        (["edges5"], "feature 'edges5'"),
        (["edges2"], "feature 'edges2'"),
        (["pixels9999"], "a side of at most 256"),
        (["edges", "EDGES16"], "no name twice"),
        (["pixels", "pixels64"], "no name twice"),
        (["standardized", "pixels64-STANDARDIZED"], "no name twice"),
        (["efflite0", "EffLite0"], "no name twice"),
        ([], "at least one"),
        (["dinov2"], "give --dinov2"),
        (["pixels8", "Inception"], "give --inception"),
    ],
)
def test_mistakes_are_one_line(names: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        choose(names)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_flags_of_a_command_give_names_and_weights() -> None:
    assert read() == (list(DEFAULT), dict.fromkeys(WEIGHTS))
    assert read("--sscd", "x.onnx")[0] == [*DEFAULT, "sscd"]
    assert read("--features", "sscd, pixels", "--sscd", "x")[0] == ["sscd", "pixels"]
    with pytest.raises(UserError, match="--sscd without sscd among the features"):
        read("--features", "pixels", "--sscd", "x")


def test_commands_can_show_their_flags_without_torch() -> None:
    code = "import ambient_sd.audit.registry, ambient_sd.commands.audit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_audit_embedding_and_benchmarks_offer_the_same_features() -> None:
    import ambient_sd

    root = Path(ambient_sd.__file__).parent
    for place in ("commands/audit/__init__.py", "audit/embedding.py", "../benchmarks/transformations.py"):
        text = (root / place).read_text()
        assert "FeatureOptions" in text and "FeatureOptions, args).chosen()" in text and '"--features"' not in text, (
            place
        )
