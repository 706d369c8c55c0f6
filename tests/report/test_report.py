"""The report: its numbers equal independent ones, its advice holds when followed, and its page renders in a browser."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, reference, smooth_lm
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.report import figures, report
from smoothquant_kernels.report import page as page_module
from smoothquant_kernels.report.measure import Plan, decibel, half_stand_in, measure, stand_in
from smoothquant_kernels.report.report import advised_config, make_report, split_name
from tests.support.browser import look_at
from tests.support.command_line import Result, refused
from tests.support.models import divided_by, layers_of, make_model, token_batches

CONFIG = SmoothQuantConfig(activation_scheme="static", alpha=0.5, massive_activations="keep")
DATA = token_batches()
HELD = [batch.flip(1) for batch in token_batches(2, 20, 3)]
#: In dB. The float32 product is off by less than 1e-5 of |y|, and the noise is more than 1e-2 of it. So the relative
#: error of sums of squared differences is below 2e-3, or 0.009 dB.
CLOSE = 0.01


def model_with_outliers(family: str) -> Any:
    """A tiny model whose attention and MLP read channels that need smoothing."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "layer_norm.weight")):
                parameter[3] = 40.0
    return model


def inputs_of(model: Any, name: str, batches: list[torch.Tensor]) -> torch.Tensor:
    """The inputs of one layer [tokens, K]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    handle.remove()
    return torch.cat(seen)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the figures, which take most of a small report's time."""
    monkeypatch.setattr(figures, "draw", lambda *a, **k: {})


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_FIGURES", 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """(model, folder, document) of a report with names that contain HTML."""
    model = model_with_outliers("llama_gqa")
    folder = tmp_path_factory.mktemp("report") / "new" / "report"
    document = make_report(
        model, DATA, folder, CONFIG, held=HELD, name="<script>alert(1)</script> & 'co'",
        sources=('"calibration" <b>', "held"),
    )  # fmt: skip
    return model, folder, document


@pytest.fixture(scope="module", params=["llama_gqa", "opt"])
def reported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Any]:
    if request.param == "llama_gqa":
        return request.getfixturevalue("drawn")  # type: ignore[no-any-return]
    model = model_with_outliers(request.param)
    folder = tmp_path_factory.mktemp("report") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *a, **k: {})
        return model, folder, make_report(model, DATA, folder, CONFIG, held=HELD)


# --- numbers --------------------------------------------------------------------------------------


def by_hand(x: torch.Tensor, module: Any, x_absmax: float, rotation: int) -> float:
    """SQNR of one static layer. The quantizer computes in float32, as specified, and all else in float64."""
    inverse = divided_by(module)
    weight = weight_of(module).detach().float() / inverse
    bias = 0.0 if module.bias is None else module.bias.detach().double()
    y = F.linear(x.double(), weight_of(module).detach().double()) + bias
    x_scale = torch.tensor(x_absmax / 127, dtype=torch.float32)
    rotated = reference.rotate(x.float() * inverse, rotation)
    x_q = (rotated * (1 / x_scale)).round().clamp(-127, 127)
    weight = reference.rotate_weight(weight, rotation)
    w_scale = weight.abs().amax(1) / 127
    w_q = (weight * (1 / w_scale[:, None])).round().clamp(-127, 127)
    y_hat = F.linear(x_q.double(), w_q.double()) * x_scale.double() * w_scale.double() + bias
    return float(10 * torch.log10(y.square().sum() / (y_hat - y).square().sum()))


def test_the_sqnr_of_every_layer_equals_a_direct_computation(reported: Any) -> None:
    model, _, document = reported
    smoothed = smooth_lm(copy.deepcopy(model), DATA, config=CONFIG, progress=False)
    layers = document["layers"]
    assert [layer["name"] for layer in layers] == list(ModelView(model).linears)
    ways = {layer["smoothing"] for layer in layers}
    assert "folded" in ways and ways <= {"folded", "runtime"}  # LLaMA's grouped queries need both
    for layer in layers:
        name = layer["name"]
        x = inputs_of(model, name, HELD)
        absmax = float(inputs_of(model, name, DATA).abs().max())
        naive = by_hand(x, model.get_submodule(name), absmax, 0)
        assert layer["sqnr_naive"] == pytest.approx(naive, abs=CLOSE), name
        assert layer["naive_scheme"] == layer["activation_scheme"] == "static"
        module = smoothed.get_submodule(name)
        inverse = divided_by(module)
        # The range was measured before the folds rounded anything.
        seen = reference.rotate(inputs_of(smoothed, name, DATA) * inverse, layer["rotation"])
        # The largest of the tokens that calibration keeps, which is nearly the largest of all.
        assert 0.9 < layer["x_absmax"] / float(seen.abs().max()) < 1 + 1e-5
        held = inputs_of(smoothed, name, HELD)
        now = by_hand(held, module, layer["x_absmax"], layer["rotation"])
        assert layer["sqnr"] == pytest.approx(now, abs=CLOSE), name
    assert document["held"]["tokens"] == sum(ids.numel() for ids in HELD)
    assert document["summary"]["sqnr"]["worst"] == min(layer["sqnr"] for layer in layers)
    gains = [layer["sqnr"] - layer["sqnr_naive"] for layer in layers]
    assert max(gains) > 5  # smoothing the outliers must pay off


def test_maxima_equal_those_that_hooks_measure(reported: Any) -> None:
    model, _, document = reported
    smoothed = smooth_lm(copy.deepcopy(model), DATA, config=CONFIG, progress=False)
    assert len(document["figures"]) >= 3
    info = layers_of(smoothed)
    groups = {layer["name"]: tuple(layer["group"]) for layer in document["layers"]}
    for figure in document["figures"]:
        name = figure["layer"]
        before = inputs_of(model, name, DATA).abs().amax(0)
        # The file has six digits, so values are off by half a unit of the sixth.
        torch.testing.assert_close(torch.tensor(figure["absmax"]), before, rtol=5e-6, atol=0)
        inverse = divided_by(smoothed.get_submodule(name))
        after = (inputs_of(smoothed, name, DATA) * inverse).abs().amax(0)
        # A fold rounds each element a few times.
        torch.testing.assert_close(
            torch.tensor(figure["absmax_smoothed"]), after, rtol=2e-5, atol=1e-6
        )
        rotation = figure["rotation"]
        assert rotation == info[name]["rotation"] > 0
        x = inputs_of(smoothed, name, DATA) * inverse
        maxima = (reference.rotate(x, rotation).abs() / rotation**0.5).amax(0)
        rotated = torch.tensor(figure["absmax_rotated"])  # of the kept tokens
        assert bool((rotated <= maxima * (1 + 2e-5)).all()) and rotated.max() > 0.9 * maxima.max()
    roles = [split_name(groups[f["layer"]][0])[1] for f in document["figures"]]
    assert len(set(roles)) == len(roles)  # one figure for each role
    peaks = {layer["name"]: layer["channel_peak"] for layer in document["layers"]}
    shown = [peaks[f["layer"]] for f in document["figures"]]
    assert shown == sorted(shown, reverse=True) and shown[0] == max(peaks.values())


@pytest.mark.usefixtures("no_drawing")
def test_the_advice_holds_when_followed(reported: Any, tmp_path: Path) -> None:
    model, folder, document = reported
    sqnr = {layer["name"]: layer["sqnr"] for layer in document["layers"]}
    assert [a["sqnr"] for a in document["advice"]] == sorted(sqnr.values())[:10]
    for entry in document["advice"]:
        tried = entry["tried"]
        assert entry["sqnr"] == tried[0]["sqnr"] == sqnr[entry["layer"]]
        assert [t["alpha"] for t in tried] == [0.5, 0.3, 0.4, 0.6, 0.7, 0.5]
        assert [t["activation_scheme"] for t in tried[1:]] == ["static"] * 4 + ["per_token"]
        assert 0 <= entry["weights_share"] <= 1
    advised = [a for a in document["advice"] if a["settings"]]
    alphas = [a for a in advised if "schemes" not in a["settings"]]
    schemes = [a for a in advised if "schemes" in a["settings"]]
    assert schemes  # the tokens of a random model differ enough for per_token to help
    for i, entry in enumerate([*schemes[:2], *alphas[:1]]):
        config = advised_config(CONFIG, [entry])
        assert set(entry["group"]) == set(config.alphas)
        again = make_report(model, DATA, tmp_path / f"{i}", config, held=HELD)
        layer = next(x for x in again["layers"] if x["name"] == entry["layer"])
        assert layer["sqnr"] == pytest.approx(entry["sqnr_then"], abs=CLOSE)
        assert layer["sqnr"] > entry["sqnr"] + 0.1
    everything = SmoothQuantConfig.from_json((folder / "advised.json").read_text())
    assert everything == advised_config(CONFIG, document["advice"])


def test_noise_of_weights_and_of_activations_add_up(drawn: Any) -> None:
    # Roundings of weights and activations are nearly independent. So their noise adds up to the whole, except for the
    # product of both errors and for chance, which stay within a quarter here.
    model, _, document = drawn
    name = document["layers"][0]["name"]
    whole = stand_in(Plan(None, "per_token", None), name, CONFIG)
    halves = [half_stand_in(whole, weights=True), half_stand_in(whole, weights=False)]
    measured = measure(model, {name: [whole, *halves]}, [{"input_ids": ids} for ids in HELD])
    both, by_weights, by_activations = measured.noise[name]
    assert 0.75 * both < by_weights + by_activations < 1.25 * both
    assert min(by_weights, by_activations) > 0


def test_padding_is_not_measured() -> None:
    model = make_model("llama")
    name = "model.layers.0.mlp.up_proj"
    stands = {name: [stand_in(Plan(None, "per_token", None), name, CONFIG)]}
    ids = HELD[0][:1]
    plain = measure(model, stands, [{"input_ids": ids}])
    padded = torch.cat([ids, torch.full((1, 9), 5)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 9, dtype=torch.long)], 1)
    masked = measure(model, stands, [{"input_ids": padded, "attention_mask": mask}], shown=[name])
    # Attention over a longer row adds in another order.
    assert masked.noise[name][0] == pytest.approx(plain.noise[name][0], rel=1e-3)
    assert masked.signal[name] == pytest.approx(plain.signal[name], rel=1e-5)
    assert masked.tokens == plain.tokens == ids.numel() == len(masked.shown[name])
    assert masked.sqnr("absent") is None
    assert decibel(0.01) == pytest.approx(20) and decibel(0.0) == float("inf")


@pytest.mark.usefixtures("one_figure")
def test_reports_are_reproducible(tmp_path: Path) -> None:
    model = model_with_outliers("llama")
    before = copy.deepcopy(model.state_dict())
    for name in ("a", "b"):
        make_report(model, DATA[:1], tmp_path / name, CONFIG, held=HELD[:1])
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"report.html", "report.json", "sqnr.png", "alpha.png", "activations_1.png"} <= set(
        files
    )
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.usefixtures("no_drawing")
def test_a_report_on_a_model_that_is_not_smoothed(tmp_path: Path) -> None:
    document = make_report(
        make_model("gpt2"), DATA[:1], tmp_path / "r", CONFIG.replace(smooth=False), held=HELD[:1]
    )
    for layer in document["layers"]:
        assert layer["sqnr"] == layer["sqnr_naive"] and layer["alpha"] is None
    assert document["summary"]["none"] == document["summary"]["quantized"] == 8
    for entry in document["advice"]:
        assert [t["activation_scheme"] for t in entry["tried"]] == ["static", "per_token"]


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the tags and checks that they are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_without_script_or_network(drawn: Any) -> None:
    _, folder, document = drawn
    page = (folder / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    names = [tag for tag, _ in reader.tags]
    assert "script" not in names and "b" not in names and "link" not in names
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#x27;co&#x27;" in page
    assert not re.search(
        r"(src|href)\s*=\s*[\"'](?!data:image/png;base64,)|url\(|@import|https?:", page
    )
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == len(document["figures"]) + 2
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    # The page shows the numbers of the document.
    for layer in document["layers"]:
        assert f">{layer['sqnr']:.1f}</td>" in page
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(document))


def test_a_browser_shows_the_whole_page(drawn: Any, tmp_path: Path) -> None:
    _, folder, document = drawn
    seen, console = look_at(folder / "report.html", tmp_path)
    assert console == "" and seen["scripts"] == 0
    assert seen["inner"] == 1280 and seen["width"] <= 1280
    assert seen["lang"] == "en" and seen["title"].startswith("SmoothQuant W8A8: <script>")
    assert len(seen["images"]) == len(document["figures"]) + 2
    for image in seen["images"]:
        assert image["complete"] and image["width"] > 0 and image["alt"]
        assert 600 < image["shown"] <= 1280
    assert seen["texts"] > 200
    assert seen["small"] == [] and seen["clipped"] == [] and seen["faint"] == []
    levels = seen["headings"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(seen["boxes"]) == 3
    for box in seen["boxes"]:
        assert (
            box["right"] <= 1280 and box["focus"] == 0 and box["label"] and box["reach"] == "auto"
        )


def test_the_browser_check_detects_defects(tmp_path: Path) -> None:
    """The measuring script must detect each kind of defect."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><html><body><h1>a</h1><h3 style="color:#ccc">faint</h3>'
        '<p style="font-size:9px">small</p><div style="width:30px;overflow:hidden;white-space:nowrap">clipped text'
        '</div><img src="gone.png" alt=""><div style="width:2000px">wide</div></body></html>'
    )
    seen, _ = look_at(page, tmp_path)
    assert seen["width"] >= 2000 and seen["images"][0]["width"] == 0 and seen["headings"] == [1, 3]
    assert [e.split(": ")[1] for e in seen["small"]] == ["small"]
    assert [e.split(": ")[1] for e in seen["faint"]] == ["faint"]
    assert "clipped text" in [e.split(": ")[1] for e in seen["clipped"]]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_drawing")
def test_wrong_requests_are_refused_and_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = make_model("llama"), tmp_path / "report"
    for message, changes in (
        ("tokens must be at least 1, got 0", {"tokens": 0}),
        ("the held data is empty", {"held": []}),
        ("needs the tokenizer", {"text": ["some text"]}),
    ):
        with pytest.raises(SmoothQuantError, match=message):
            make_report(model, DATA[:1], target, CONFIG, **{"held": HELD[:1], **changes})
    monkeypatch.setattr(page_module, "page", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_report(model, DATA[:1], target, CONFIG, held=HELD[:1])
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    for overwrite, message in ((False, "exists already"), (True, "is not a report")):
        with pytest.raises(SmoothQuantError, match=message):
            make_report(model, DATA[:1], target, CONFIG, held=HELD[:1], overwrite=overwrite)
    assert (target / "mine.txt").read_text() == "precious"


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_drawing")
def test_the_command_accepts_a_model_or_a_checkpoint(
    tiny: Path, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    common = ("--calibration", text, "--text", text, "--tokens", 60, "--calibration-tokens", 200)
    output = tmp_path / "r"
    done = Result("report", tiny, "-o", output, *common, "--json", "--device", "cpu").json
    assert done["output"] == str(output) and done["model"] == "tiny"
    written = json.loads((output / "report.json").read_text())
    assert written == {k: v for k, v in done.items() if k not in ("output", "seconds")}
    assert done["evaluation"]["smoothed"]["tokens"] == 59  # the first token has no context
    assert done["evaluation"]["float"]["mean_kl"] == 0 < done["evaluation"]["smoothed"]["mean_kl"]
    # The checkpoint was made with the same settings and data, so its report is the same.
    other = tmp_path / "c"
    shown = Result(
        "report", checkpoint, "--reference", tiny, "-o", other, *common, "--device", "cpu"
    )
    assert shown.code == 0 and "see " in shown.out and "dB median" in shown.out, shown.err
    assert json.loads((other / "report.json").read_text()) == written


def test_refusals_of_the_command(tiny: Path, text: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "r"
    assert "--reference" in refused("report", checkpoint, "-o", output)
    assert "leave it out" in refused("report", tiny, "--reference", tiny, "-o", output)
    given = ("--reference", tiny, "-o", output)
    assert "the settings are those of" in refused("report", checkpoint, *given, "--alpha", "0.3")
    assert "is quantized" in refused("report", checkpoint, "--reference", checkpoint, "-o", output)
    assert "alpha must be" in refused("report", tiny, "-o", output, "--alpha", "2")
    assert "no file or folder" in refused("report", tiny, "-o", output, "--text", tmp_path / "no")
    assert not output.exists()
    output.mkdir()
    (output / "x").touch()
    assert "exists already" in refused("report", tiny, "-o", output)
    assert "is not a report" in refused("report", tiny, "-o", output, "--force")
