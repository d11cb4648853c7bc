import json
import shutil
import warnings

import numpy
import pytest
import torch

from data.config import ConfigError
from data.sample import DataError
from tests.helpers.stripes import stripe_shards, stripes, train_config
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import ModelError, content_hash, load_part, save_part
from vqvae.train_tokenizer import InMemoryBatches, StreamedBatches, train
from vqvae.training.config import TrainingError

TINY = VQVAEConfig(channels=[4, 8], residual_blocks=1, code_dim=4, codebook_size=16)


def tiny(**changes) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**{**vars(TINY), **changes})).eval()


# the model


@pytest.mark.parametrize("channels", [[4], [4, 8], [4, 8, 8]])
@pytest.mark.parametrize("residual_blocks", [0, 1])
@pytest.mark.parametrize("lookup", ["cosine", "euclidean"])
def test_shapes(channels, residual_blocks, lookup):
    model = tiny(channels=channels, residual_blocks=residual_blocks, lookup=lookup)
    stride = model.config.stride
    assert stride == 2 ** len(channels)
    for height, width in ((stride, stride), (3 * stride, 5 * stride), (40, 16)):
        images = torch.rand(2, 3, height, width)
        codes = model.encode(images)
        assert codes.shape == (2, height // stride, width // stride)
        assert codes.dtype == torch.int64
        assert 0 <= int(codes.min()) <= int(codes.max()) < model.config.codebook_size
        restored = model.decode(codes)
        assert restored.shape == images.shape
        assert restored.dtype == torch.float32
        assert 0 <= float(restored.min()) <= float(restored.max()) <= 1


def test_the_default_has_a_code_for_8x8_pixels():
    assert VQVAEConfig().stride == 8


def test_forward_is_encode_and_decode():
    model = tiny()
    images = torch.rand(2, 3, 16, 24)
    whole = model(images)
    codes = model.encode(images)
    assert torch.equal(whole.codes, codes)
    torch.testing.assert_close(whole.images.clamp(0, 1), model.decode(codes))
    torch.testing.assert_close(whole.pixel_loss, (whole.images - images).square().mean())


def test_pictures_of_a_batch_do_not_touch_each_other():
    model = tiny()
    images = torch.rand(5, 3, 16, 16)
    codes = torch.cat([model.encode(image.unsqueeze(0)) for image in images])
    assert torch.equal(model.encode(images), codes)


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 18), (1, 3, 2, 2), (3, 16, 16), (1, 1, 16, 16)])
def test_other_sizes_are_refused(shape):
    for call in (tiny(), tiny().encode):
        with pytest.raises(ValueError, match=r"multiples of 4, not|must be \[B, 3, H, W\]"):
            call(torch.rand(shape))


@pytest.mark.parametrize("wrong", [-1, 16])
def test_codes_outside_the_codebook_are_refused(wrong):
    with pytest.raises(ValueError, match=r"0\.\.15"):
        tiny().decode(torch.tensor([[[0, wrong]]]))


@pytest.mark.parametrize("changes", [{"upsampling": "nearest"}, {"upsampling": "transposed", "residual_blocks": 0}])
def test_a_decoder_larger_than_the_encoder(changes):
    model = tiny(decoder_channels=[8, 16], decoder_blocks=3, stage_blocks=1, **changes)
    assert model.decode(model.encode(torch.rand(2, 3, 16, 24))).shape == (2, 3, 16, 24)
    plain = tiny(residual_blocks=model.config.residual_blocks)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.decoder, plain.decoder)]
    assert sizes[0] > 2 * sizes[1]
    assert model.encoder.state_dict().keys() == plain.encoder.state_dict().keys()
    assert len(model.decoder.blocks) == 3
    assert [len([*stage.children()]) for stage in model.decoder.refine] == [1, 0]


def test_a_decoder_of_another_stride_is_refused():
    with pytest.raises(ValueError, match="as many stages"):
        VQVAEConfig(decoder_channels=[4])


@pytest.mark.parametrize("change", [{"channels": []}, {"codebook_size": 1}, {"code_dim": 0}])
def test_impossible_configurations_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        VQVAEConfig(**change)


def test_gradient_reaches_the_encoder():
    model = tiny().train()
    found = model(torch.rand(2, 3, 16, 16))
    found.pixel_loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    first = next(model.encoder.parameters()).grad
    assert first is not None
    assert float(first.abs().sum()) > 0


# on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"mean": [0.1, 0.2, 0.3], "lookup": "cosine"}])
def test_save_and_load(tmp_path, dtype, changes):
    model = tiny(**changes)
    name = save_part(model, tmp_path / "tokenizer", dtype)
    loaded = load_part(VQVAE, tmp_path / "tokenizer")
    assert content_hash(loaded) == name
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.encoder.project.weight.dtype == dtype
    assert content_hash(model) == content_hash(tiny(**changes))  # what was saved is a copy
    if dtype == torch.float32:
        assert name == content_hash(model)
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(loaded.encode(images), model.encode(images))
        assert torch.equal(loaded.decode(model.encode(images)), model.decode(model.encode(images)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "tokenizer"]


def test_saving_replaces_what_was_there(tmp_path):
    save_part(tiny(codebook_size=32), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "stray").touch()
    name = save_part(tiny(), tmp_path / "tokenizer")
    assert content_hash(load_part(VQVAE, tmp_path / "tokenizer")) == name
    assert not (tmp_path / "tokenizer" / "stray").exists()


def test_the_hash_sees_names_shapes_dtypes_and_values():
    model = tiny()
    names = {content_hash(model), content_hash(tiny().bfloat16()), content_hash(tiny(codebook_size=17))}
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert len(names | {content_hash(model)}) == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    save_part(tiny(), folder)
    return folder


def problem_of(folder) -> str:
    with pytest.raises(ModelError) as error:
        load_part(VQVAE, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / name).unlink()
    assert f"{name} is missing" in problem_of(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_weights(saved, tmp_path, keep):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated or damaged" in problem_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"'])
def test_a_config_that_is_no_object(saved, tmp_path, content):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "config.json").write_text(content)
    assert "config.json is damaged" in problem_of(folder)


@pytest.mark.parametrize(
    "change",
    [{"channels": []}, {"channels": "wide"}, {"channels": None}, {"codebook_size": 1}, {"codebook_size": "many"},
     {"code_dim": 5}, {"channels": [4, 8, 8]}, {"mean": 3}],
)  # fmt: skip
def test_a_config_that_does_not_fit(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert "does not hold" in problem_of(folder)


def test_another_kind_of_model(saved, tmp_path):
    from generation.transformer.config import TransformerConfig
    from generation.transformer.model import Transformer

    config = TransformerConfig(num_image_codes=8, num_text_pieces=300, width=16, depth=1, heads=1)
    save_part(Transformer(config), tmp_path / "generator")
    assert "does not hold this VQVAE" in problem_of(tmp_path / "generator")
    with pytest.raises(ModelError, match="does not hold this Transformer"):
        load_part(Transformer, saved)


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "neither a folder nor a model that can be fetched (no network)" in problem_of(tmp_path / "none")


# training


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return stripe_shards(tmp_path_factory.mktemp("shards"))


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_improves_psnr(shards, tmp_path, precision):
    folder = train(train_config(shards, tmp_path / "run", precision=precision, ema=0.9))
    tests = [record for record in read_log(tmp_path / "run") if "test/psnr" in record]
    assert [record["step"] for record in tests] == [20, 40, 60, 80]
    assert tests[-1]["test/psnr"] > tests[0]["test/psnr"] + 1
    assert 0 < tests[-1]["test/usage"] <= 1
    assert 1 < tests[-1]["test/perplexity"] <= 16
    model = load_part(VQVAE, folder)
    pixels = torch.stack([torch.from_numpy(numpy.array(stripes(n))).permute(2, 0, 1) / 255 for n in range(48, 60)])
    error = (model.float().decode(model.encode(pixels)) - pixels).square().mean(dim=(1, 2, 3))
    # the saved weights are those that were measured, but for bfloat16
    assert abs(float((-10 * error.log10()).mean()) - tests[-1]["test/psnr"]) < 0.5
    assert sorted(path.name for path in (tmp_path / "run" / "sheets").iterdir())[-1] == "000080.png"


def test_streamed_pictures_are_those_of_the_shards(shards, tmp_path):
    config = train_config(shards, tmp_path, {"in_memory": False, "shuffle": 8}, batch_size=12, accumulate=3)
    batches = StreamedBatches(config)
    for step in range(4):
        found = list(batches(step))
        assert [tuple(pixels.shape) for pixels, _ in found] == [(4, 3, 16, 16)] * 3
        for pixels, ids in found:
            for picture, name in zip(pixels, ids, strict=True):
                assert numpy.array_equal(picture.permute(1, 2, 0), numpy.array(stripes(int(name[1:]))))


def test_drawn_pictures_depend_on_the_step_alone(shards, tmp_path):
    config = train_config(shards, tmp_path, batch_size=12, accumulate=3)
    first, second = InMemoryBatches(config), InMemoryBatches(config)
    list(first(0))
    drawn = [ids for _, ids in first(1)]
    assert drawn == [ids for _, ids in second(1)]
    assert drawn != [ids for _, ids in second(2)]
    assert [len(ids) for ids in drawn] == [4, 4, 4]


def test_every_process_holds_all_pictures(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")  # more than there are shards
    assert InMemoryBatches(train_config(shards, tmp_path)).ids == [f"s{number:03d}" for number in range(48)]


def test_families_can_be_left_out(shards, tmp_path):
    batches = InMemoryBatches(train_config(shards, tmp_path, {"exclude_families": ["openmoji"]}))
    assert batches.ids == [f"s{number:03d}" for number in range(1, 48, 2)]


def test_nothing_left_to_train_on(shards, tmp_path):
    with pytest.raises(DataError, match="no readable pictures"):
        train(train_config(shards, tmp_path / "run", {"exclude_families": ["openmoji", "noto"]}))


def test_a_size_that_the_stride_does_not_divide(shards, tmp_path):
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of the stride 4"):
        train(train_config(shards, tmp_path / "run", {"image_size": 18}))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_that_does_not_divide(shards, tmp_path, in_memory):
    with pytest.raises(ConfigError, match="batch_size=16 is not a multiple of accumulate x processes = 3"):
        train(train_config(shards, tmp_path / "run", {"in_memory": in_memory}, accumulate=3))


def test_a_loss_that_is_not_finite_names_the_pictures(shards, tmp_path):
    config = train_config(shards, tmp_path / "run", learning_rate=6e4, warmup=0, clip=0.0, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(TrainingError, match=r"not finite.*samples: s\d\d\d, s\d\d\d$"):
            train(config)
