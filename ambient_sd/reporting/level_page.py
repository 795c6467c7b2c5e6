"""The page of `ambient-sd level`: the noise level s_n that the images propose, with the two curves that it comes from."""

from __future__ import annotations

from pathlib import Path

from ambient_sd.data.noise_level import COPY, IDENTIFIED, TARGET, NoiseLevels, marks
from ambient_sd.reporting import charts, pages
from ambient_sd.reporting.charts import Line, Mark


def write(path: Path, found: NoiseLevels, name: str, *, resolution: int) -> Path:
    """Write the page.

    Args:
        path: of the page.
        found: what was measured.
        name: of the dataset, without its place on this machine.
        resolution: pixels, for the command to run next.
    """
    where = [Mark(f"{label} {at:.2g}", at, strong=label == "proposed")
             for label, at in (("copy", found.copy), ("proposed", found.proposed), ("collapse", found.collapse))
             if at is not None and found.levels[0] <= at <= found.levels[-1]]  # fmt: skip
    quantiles = found.ratio_quantiles
    ratios = Line("", found.levels, [q[1] for q in quantiles], [(q[0], q[2]) for q in quantiles])
    weights = Line("", found.levels, found.own, [(q[0], q[2]) for q in found.own_quantiles])
    first, second = "What a noisy copy gives away", "Does a noisy copy tell which image it was?"
    drawn = "" if found.used == found.images else f" {found.used} of them were measured and stand for the rest."
    low, middle, high = found.nearest
    curves = [
        pages.Chart(first, charts.chart(
            first, [ratios], x_label="noise level s", y_label="d1/d2", top=1.5,
            marks=[Mark("1/3: a copy", COPY, upright=False), Mark("2/3: the proposal", TARGET, upright=False), *where]),
            "d1/d2 of the noisy copy after linear denoising: median, and 5 to 95 % of the images"),
        pages.Chart(second, charts.chart(
            second, [weights], x_label="noise level s", y_label="posterior weight", top=1.0,
            marks=[Mark("1/2", IDENTIFIED, upright=False), *where]),
            "posterior weight of the true image: mean, and 5 to 95 % of the images"),
    ]  # fmt: skip
    table = pages.Table(
        ["noise level s", "what it is"], [("none" if at is None else f"{at:.2g}", text) for at, text in marks(found)], text=(1,)
    )  # fmt: skip
    return pages.write_article(
        path, f"Noise level of {name}", f"Train {name} with noise level s_n = {found.proposed:g}.",
        [
            pages.Section("Where it comes from", [_sentence(found.reason)], charts=curves,
                          terms=pages.terms("noise level s_n", "d1/d2")),
            pages.Section("The levels that mean something", [
                f"{found.images} distinct images, {found.numbers} numbers each. The nearest other image is {middle:.2f} per number away "
                f"(5 to 95 %: {low:.2f} to {high:.2f}).{drawn}"], tables=[table]),
        ],
        lead="This is a proposal from geometry, before any training. What a trained network copies is for an audit to say.",
        next=[pages.Next("Fine-tune with it; MODEL is the base:", pages.command(
            "accelerate", "launch", "train_text_to_image_ambient.py", "--pretrained_model_name_or_path", "MODEL", "--train_data_dir", name,
            "--resolution", resolution, "--objective", "ambient", "--ambient_level", f"{found.proposed:g}", "--output_dir", "my-model"))],
        made={"ambient-sd level": name, "resolution": f"{resolution} px"},
    )  # fmt: skip


def _sentence(reason: str) -> str:
    rest = reason.removeprefix("there ")
    return f"At this level {rest}." if rest != reason else f"{reason[:1].upper()}{reason[1:]}."
