"""Super-resolution: the model, its training, the pipeline's method and the command; CogView's windows."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from bench.quality.upscale_psnr import compare, structural_similarity
from data.config import ConfigError
from data.sample import Caption, Sample
from data.shards import ShardWriter
from mmwudao import load, upscaling
from mmwudao.cli.app import run
from mmwudao.loading.importing import import_cogview
from mmwudao.loading.model_dir import assemble_model, read_model_config
from mmwudao.pictures import read_recipe
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import ModelError, content_hash, load_part, save_part
from vqvae.train_upscaler import CropBatches, UpscalerTrainConfig, read_pairs, train
from vqvae.upscaler import Upscaler, UpscalerConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "cogview"
SMALL = UpscalerConfig(channels=8, blocks=2)


def shapes(seed: int, size: int = 32) -> Image.Image:
    """Two rectangles on white, with edges between pixels of the half-sized picture: all of it can be restored."""
    draw = numpy.random.default_rng(seed)
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(2):
        x, y = (2 * draw.integers(0, size // 4, 2)).tolist()
        pen.rectangle((x, y, x + size // 2 - 1, y + size // 2 - 1), fill=tuple(draw.integers(0, 256, 3).tolist()))
    return image


def untrained(seed: int = 0, config: UpscalerConfig = SMALL) -> Upscaler:
    """Random weights throughout: a fresh model's last layer is zero."""
    torch.manual_seed(seed)
    model = Upscaler(config)
    torch.nn.init.normal_(model.write.weight, std=0.1)
    return model.eval()


# the model


def test_a_fresh_model_is_bicubic():
    images = torch.rand(2, 3, 9, 14)
    expected = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(Upscaler(SMALL)(images), expected)
    assert not torch.allclose(untrained()(images), expected, atol=1e-3)


def test_the_shipped_size_is_small():
    assert sum(parameter.numel() for parameter in Upscaler(UpscalerConfig()).parameters()) == 87_596


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        Upscaler(SMALL)(torch.zeros(shape))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks must be a whole number of at least 1"):
        UpscalerConfig(blocks=0)


@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_strips_leave_no_seams(rows):
    model, images = untrained(), torch.rand(1, 3, 33, 7)
    torch.testing.assert_close(model.enlarge(images, rows), model(images).detach().clamp(0, 1), rtol=0, atol=1e-5)


def test_reach_is_how_far_a_pixel_counts():
    model = untrained()
    middle = 20
    images = torch.rand(1, 3, 41, 1, requires_grad=True)
    model(images)[0, :, 2 * middle : 2 * middle + 2].sum().backward()
    assert images.grad is not None
    felt = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert 1 < middle - int(felt.min()) <= SMALL.reach
    assert int(felt.max()) - middle <= SMALL.reach


def test_saved_and_loaded(tmp_path):
    model = untrained()
    name = save_part(model, tmp_path / "upscaler", torch.float32)
    loaded = load_part(Upscaler, tmp_path / "upscaler")
    assert loaded.config == SMALL
    assert content_hash(loaded) == name
    images = torch.rand(1, 3, 6, 6)
    assert torch.equal(loaded.enlarge(images), model.enlarge(images))
    with pytest.raises(ModelError, match="does not hold"):
        load_part(VQVAE, tmp_path / "upscaler")


# training


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, numbers in (("train", range(40)), ("test-concept", range(40, 52))):
        with ShardWriter(folder, split, samples_per_shard=20) as writer:
            for number in numbers:
                buffer = io.BytesIO()
                shapes(number).save(buffer, "PNG")
                captions = {"en": Caption(f"shape {number}")}
                family = "noto" if number % 4 else "fxemoji"
                writer.write(Sample(f"s{number:03d}", buffer.getvalue(), "png", captions, family=family))
    return folder


def train_config(shards: Path, out: Path, **data: object) -> UpscalerTrainConfig:
    config = UpscalerTrainConfig(model=SMALL)
    config.data.shards, config.data.image_size, config.data.crop = str(shards), 32, 12
    config.data.exclude_families = ["fxemoji"]
    for name, value in data.items():
        setattr(config.data, name, value)
    loop = config.loop
    loop.out, loop.steps, loop.batch_size, loop.warmup, loop.precision = str(out), 250, 8, 10, "float32"
    loop.learning_rate, loop.ema, loop.eval_every, loop.log_every, loop.device = 3e-3, 0.9, 25, 50, "cpu"
    return config


def test_training_beats_bicubic_on_edges(shards, tmp_path):
    config = train_config(shards, tmp_path / "run")
    model = load_part(Upscaler, train(config)).float()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [record["test/psnr"] for record in records if "test/psnr" in record]
    assert logged[-1] > logged[0] + 0.5
    test = read_pairs(config.data, "test-concept", 100, None)
    ours, bicubic = [], []
    for small, large in zip(test.small, test.large, strict=True):
        picture, expected = (Image.fromarray(one.permute(1, 2, 0).numpy()) for one in (small, large))
        made = model.enlarge(small[None] / 255)[0]
        ours.append(-10 * float((made - large / 255).square().mean().log10()))
        bicubic.append(compare(picture.resize((32, 32), Image.Resampling.BICUBIC), expected)[0])
    assert numpy.mean(ours) > numpy.mean(bicubic) + 1
    assert abs(numpy.mean(ours) - logged[-1]) < 0.5  # but for the saved weights' bfloat16


def test_inputs_are_the_pictures_at_half_their_size(shards, tmp_path):
    torch.manual_seed(0)
    save_part(VQVAE(VQVAEConfig(channels=[8, 8], code_dim=4, codebook_size=8)), tmp_path / "tokenizer", torch.float32)
    config = train_config(shards, tmp_path, decoded=0.5, crop=16)
    tokenizer = load_part(VQVAE, tmp_path / "tokenizer")
    pairs = read_pairs(config.data, "train", 12, tokenizer)
    assert pairs.decoded is not None
    assert pairs.ids == [f"s{number:03d}" for number in range(16) if number % 4]
    assert torch.equal(pairs.decoded[:1], (tokenizer.decode(tokenizer.encode(pairs.small[:1] / 255)) * 255).round())
    by = {name: k for k, name in enumerate(pairs.ids)}
    made: set[str] = set()
    for step in range(6):
        for (small, large), ids in CropBatches(config, pairs)(step):
            for one, whole, name in zip(small, large, ids, strict=True):
                k = by[name]
                averaged = F.avg_pool2d(pairs.large[k].float(), 2).round()
                assert torch.equal(whole, pairs.large[k])
                ways = {"lanczos": pairs.small[k], "decoded": pairs.decoded[k], "averaged": averaged}
                found = [way for way, picture in ways.items() if torch.equal(one, picture)]
                assert found
                made.update(found[:1])
    assert made == {"lanczos", "decoded", "averaged"}


def test_crops_match_their_pictures(shards, tmp_path):
    config = train_config(shards, tmp_path, decoded=0.0, crop=8)
    pairs = read_pairs(config.data, "train", 5, None)
    pairs.small = torch.stack([F.avg_pool2d(one.float(), 2).round().to(torch.uint8) for one in pairs.large])
    config.loop.accumulate = 2
    parts = list(CropBatches(config, pairs)(3))
    assert [len(ids) for _, ids in parts] == [4, 4]
    for (small, large), _ in parts:
        assert torch.equal(small, F.avg_pool2d(large.float(), 2).round().to(torch.uint8))


@pytest.mark.parametrize("change", [{"crop": 17}, {"crop": 0}, {"image_size": 33}])
def test_a_crop_that_does_not_fit(shards, tmp_path, change):
    with pytest.raises(ConfigError, match="must lie in 1..16"):
        train(train_config(shards, tmp_path, **change))


def test_ssim():
    torch.manual_seed(0)
    picture = torch.rand(24, 24)
    assert structural_similarity(picture, picture) == pytest.approx(1)
    # two flat pictures: only the term of the means is left
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert structural_similarity(torch.full((16, 16), 0.2), torch.full((16, 16), 0.6)) == pytest.approx(expected, 1e-3)
    assert structural_similarity(picture, 1 - picture) < 0


# the pipeline and the command


@pytest.fixture(scope="module")
def with_upscaler(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an upscaler."""
    folder = tmp_path_factory.mktemp("upscaling")
    save_part(untrained(), folder / "part")
    config = read_model_config(tiny_model_dir)
    return assemble_model(
        tiny_model_dir / "tokenizer", tiny_model_dir / "generator", tiny_model_dir / "text.model", folder / "model",
        name="larger", image_size=32, styles=config.styles, languages=config.languages,
        default_sampling=config.default_sampling, optional={"upscaler": folder / "part"},
    )  # fmt: skip


@pytest.fixture
def upscale(with_upscaler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `upscale` in this process on the CPU, into tmp_path/out."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, model: Path = with_upscaler) -> int:
        words = map(str, arguments)
        return run(["upscale", "--model", str(model), "--device", "cpu", "--dtype", "float32", "-o", "out", *words])

    return call


def test_the_command_doubles_pictures_of_any_shape(upscale, with_upscaler, tmp_path, capsys):
    shapes(0).crop((0, 0, 32, 20)).save("a.png")
    shapes(1).convert("L").save("b.jpg")
    assert upscale("a.png", "b.jpg", "a.png") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "out/a-upscaled.png  64x40", "out/b-upscaled.png  64x64", "out/a-upscaled-2.png  64x40",
    ]  # fmt: skip
    assert captured.err == ""
    with Image.open("out/a-upscaled.png") as image:
        made, text = image.convert("RGB"), dict(image.text)  # type: ignore[attr-defined]
    model = load_part(Upscaler, with_upscaler / "upscaler").float()
    pixels = numpy.asarray(shapes(0).crop((0, 0, 32, 20)))
    expected = model(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255).detach().clamp(0, 1)
    assert numpy.array_equal(numpy.asarray(made), (expected[0] * 255).round().permute(1, 2, 0).byte().numpy())
    assert text["model_hash"] == read_model_config(with_upscaler).model_hash
    assert text["Software"].startswith("mmwudao ")
    with pytest.raises(ValueError, match="holds no recipe"):
        read_recipe(Path("out/a-upscaled.png"))


def test_transparent_pictures_stay_transparent(upscale):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("clear.png")
    Image.new("RGBA", (8, 8), (200, 20, 20, 255)).save("opaque.png")
    assert upscale("clear.png", "opaque.png") == 0
    with Image.open("out/clear-upscaled.png") as clear:
        assert clear.mode == "RGBA"
        assert clear.getchannel("A").getextrema() == (0, 0)
    with Image.open("out/opaque-upscaled.png") as opaque:
        assert opaque.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def test_a_prompt_that_is_not_read_is_told(upscale, caplog, capsys):
    shapes(0).save("a.png")
    assert upscale("a.png", "--prompt", "苹果", "--json") == 0
    assert "reads no prompt" in caplog.text
    record = json.loads(capsys.readouterr().out)
    assert (record["path"], record["width"], record["height"]) == ("out/a-upscaled.png", 64, 64)
    assert "prompt" not in record


def test_bad_inputs_are_one_line_and_leave_nothing(upscale, tiny_model_dir, capsys):
    shapes(0).save("good.png")
    Path("text.png").write_text("not a picture")
    Image.new("RGB", (upscaling.MAX_SIDE + 1, 2)).save("wide.png")
    for arguments, options, message in (
        (["absent.png"], {}, "no picture at absent.png"),
        (["."], {}, "no picture at ."),
        (["good.png", "text.png"], {}, "text.png: not a picture"),
        (["good.png", "wide.png"], {}, "wide.png: 2049x2 pixels: at most 2048 a side"),
        (["good.png", "--prompt", " "], {}, "an empty prompt"),
        (["good.png"], {"model": tiny_model_dir}, "it has no upscaler"),
        (["good.png"], {"model": Path("absent")}, "no model 'absent'"),
        ([], {}, "Missing argument"),
    ):
        assert upscale(*arguments, **options) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert not Path("out").exists()


def test_the_largest_picture_is_not_refused():
    upscaling.check_size(Image.new("RGB", (upscaling.MAX_SIDE, upscaling.MAX_SIDE)))


def test_info_counts_the_upscaler(with_upscaler, capsys):
    assert run(["info", str(with_upscaler)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("upscaler"))
    assert f"{sum(parameter.numel() for parameter in untrained().parameters()):,} parameters" in line
    assert "bfloat16" in line


def test_an_upscaler_of_another_model_is_refused(with_upscaler, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(with_upscaler, folder)
    save_part(untrained(seed=1), folder / "upscaler")
    with pytest.raises(ModelError, match="upscaler is not the one config.json names"):
        load(folder, "cpu", "float32").upscale([shapes(0)])


def test_no_picture(with_upscaler):
    with pytest.raises(ValueError, match="no picture"):
        load(with_upscaler, "cpu", "float32").upscale([])


# CogView


@pytest.fixture(scope="module")
def cogview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoints as a model directory."""
    folder = tmp_path_factory.mktemp("cogview")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red heart", "a red apple", "quick brown fox jumps over the lazy dog", "0123456789"]),
        model_prefix=str(folder / "text"), vocab_size=100, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return import_cogview(
        GOLDEN / "vqvae" / "vqvae.pt", GOLDEN / "transformer" / "ckpt", folder / "text.model", folder / "model", heads=4
    )


def test_cogview_draws_windows_from_the_codes_and_the_prompt(upscale, cogview, monkeypatch):
    asked = []

    def doubled(model, head, codes, options, *, generator):
        asked.append((head, codes, options, generator.initial_seed()))
        return codes.repeat_interleave(2, 0).repeat_interleave(2, 1)

    monkeypatch.setattr(upscaling, "magnify", doubled)
    shapes(0, 256).save("a.png")
    assert upscale("a.png", "a.png", "--prompt", "a red apple", "--seed", "7", model=cogview) == 0
    pipeline = load(cogview, "cpu", "float32")
    vocab = pipeline.generator.config.vocabulary
    head, codes, options, seed = asked[0]
    text = vocab.text(pipeline.text.encode("a red apple"))
    assert head == [vocab.command("[ROI1]"), *text, vocab.command("[BASE]"), vocab.command("[BOI1]")]
    pixels = torch.from_numpy(numpy.asarray(shapes(0, 256)).copy()).permute(2, 0, 1)[None] / 255
    assert torch.equal(codes, pipeline.tokenizer.encode(pixels)[0])
    assert options == pipeline.config.default_sampling
    assert [seed, asked[1][3]] == [7, 8]
    with Image.open("out/a-upscaled.png") as image:
        assert image.size == (512, 512)
        assert (image.text["seed"], image.text["prompt"]) == ("7", "a red apple")  # type: ignore[attr-defined]


def test_cogview_needs_a_prompt(upscale, cogview, capsys):
    shapes(0).save("a.png")
    assert upscale("a.png", model=cogview) == 2
    assert "give a prompt" in capsys.readouterr().err


@pytest.mark.slow
def test_cogview_enlarges_a_picture(cogview):
    image = load(cogview, "cpu", "float32").upscale([shapes(0, 100)], "red heart", seed=1)[0]
    assert image.size == (512, 512)
    assert image.info["prompt"] == "red heart"
