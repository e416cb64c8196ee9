"""What a folder of pictures becomes, and training on pictures of several sizes, with masks and pictures of the class."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, features

from seqlora_core.captions import unread
from seqlora_core.config import PictureOptions, TrainingConfig
from seqlora_core.diffusers_folder import open_folder
from seqlora_core.errors import UserError
from seqlora_core.pictures import Pictures, load, mirrored
from seqlora_core.references import captions_of_class, complete_captions
from seqlora_core.teach import train_concept

QUICK = {"use_decoys": False, "replay_batch": 4, "batch": 2}


def picture(path, width, height, colour=(200, 30, 30), alpha=None):
    noise = np.random.default_rng(sum(path.name.encode())).integers(0, 60, (height, width, 3))
    values = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(values)
    if alpha is not None:
        image.putalpha(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def test_squares_say_what_was_cut_enlarged_or_double(tmp_path):
    picture(tmp_path / "a.png", 200, 100).save(tmp_path / "b.png")
    picture(tmp_path / "c.png", 32, 32)
    (tmp_path / "a.txt").write_text("a zqx cat", encoding="utf-8")
    (sets,), notes = load(tmp_path, 64, PictureOptions())
    assert sets.images.shape == (3, 64, 64, 3) and sets.captions == ["a zqx cat", None, None] and sets.masks is None
    text = "\n".join(notes)
    assert "a.png: 200 x 100 became 64 x 64, 50% of it cut off" in text and "b.png is the same picture as a.png" in text
    assert "c.png: 32 x 32 became 64 x 64, enlarged 2.0 times" in text


def test_buckets_keep_shapes_and_never_enlarge(tmp_path):
    for name, size in {"a": (1600, 900), "b": (1600, 900), "c": (900, 1600), "d": (512, 512), "e": (200, 300)}.items():
        picture(tmp_path / f"{name}.png", *size)
    sets, notes = load(tmp_path, 512, PictureOptions(buckets=True))
    shapes = [tuple(s.images.shape) for s in sets]
    assert shapes[0] == (2, 384, 640, 3) and sorted(shapes[1:]) == [(1, 256, 192, 3), (1, 512, 512, 3), (1, 640, 384, 3)]
    assert all(h * w <= 512 * 512 for _, h, w, _ in shapes) and not any("enlarged" in n for n in notes)


def test_buckets_stay_within_what_the_model_takes(model, tmp_path):
    """A long picture of the demo model's largest area; what is out of its reach is refused before anything is trained"""
    picture(tmp_path / "a.png", 3000, 200)
    (sets,), _ = load(tmp_path, 256, PictureOptions(buckets=True), model)
    (free,), _ = load(tmp_path, 256, PictureOptions(buckets=True))
    assert sets.images.shape == (1, 64, 256, 3) and free.images.shape == (1, 64, 960, 3)
    latents = model.encode_images(sets.images)
    assert model.predict(latents, torch.full((1,), 0.5), model.encode_prompts(["x"])).shape == latents.shape
    for side in (72, 272):
        with pytest.raises(UserError, match=f"pictures of {side} x {side} pixels do not fit this model"):
            load(tmp_path, 64, PictureOptions(resolution=side), model)


def test_pictures_of_sixteen_bits_keep_their_tones(tmp_path):
    grey = np.full((64, 64), 65535 // 4, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.full((64, 64), 65535 * 3 // 10, dtype=np.uint16)).save(tmp_path / "a.mask.png")
    (sets,), _ = load(tmp_path, 64, PictureOptions())
    assert sets.images.mean() == pytest.approx(0.25, abs=0.003) and sets.masks.mean() == pytest.approx(0.3, abs=0.003)


def test_pictures_are_of_every_kind_that_pillow_opens(tmp_path):
    for suffix in ("jfif", "gif", "tif", "TIFF", *(["avif"] if features.check("avif") else [])):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"a.{suffix}", {"jfif": "JPEG"}.get(suffix))
    moving = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    moving[0].save(tmp_path / "b.gif", save_all=True, append_images=moving[1:])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.webp", exif=b"no EXIF")
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(tmp_path / "c.tif")
    (sets,), notes = load(tmp_path, 64, PictureOptions())
    assert len(sets.images) == 7 + features.check("avif") and not any("not read" in n for n in notes)
    assert torch.allclose(sets.images[:-1].mean((0, 1, 2)), torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    assert sets.images[-1].mean() == pytest.approx(0.5, abs=0.003)


def test_what_is_not_read_is_told_in_one_note(tmp_path):
    picture(tmp_path / "a.png", 64, 64).save(tmp_path / "a.mask.png")
    for name in ("a.TXT", "a.npz", "other.txt", "meta.json", ".hidden.heic", "._a.png", "set.toml", "Thumbs.db"):
        (tmp_path / name).write_text("an {trigger}")
    for name in ("b", "0_none/c", "held_out/d", "2_face/e"):
        picture(tmp_path / f"{name}.png", 64, 64)
    (tmp_path / "empty").mkdir()
    (sets,), notes = load(tmp_path, 64, PictureOptions())
    assert sets.captions == [None, "an {trigger}", None] and not any("not read" in n for n in notes)
    for name in ("w.mp4", "x.psd", "2_face/y.psd", "z.psd"):
        (tmp_path / name).write_bytes(b"")
    for name in ("photos/old/f", "2_face/more/g"):
        picture(tmp_path / f"{name}.png", 64, 64)
    assert load(tmp_path, 64, PictureOptions())[1][-1] == (
        "not read: 4 files (w.mp4, x.psd, z.psd, ...; save pictures as PNG or JPEG), "
        "folder photos/ (make it 1_photos/ to read it), folder 2_face/more/ (make it 1_more/ to read it)"
    )


def test_a_picture_beyond_pillows_limit_is_too_large(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png is too large, of more than 178 million pixels: make it smaller"):
        load(tmp_path, 64, PictureOptions())


def test_a_mask_may_be_transparent_and_of_any_case_and_format(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", 64, 64)
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 32, 64))
    clear.save(tmp_path / "a.MASK.PNG")
    Image.new("L", (64, 64), 128).save(tmp_path / "b.mask.webp")
    (tmp_path / "._a.png").write_bytes(b"what a Mac leaves beside a file")
    (sets,), _ = load(tmp_path, 64, PictureOptions())
    assert len(sets.images) == 2 and sets.masks[0, :, :32].eq(1).all() and sets.masks[0, :, 32:].eq(0).all()
    assert sets.masks[1].mean() == pytest.approx(0.5, abs=0.02)


def test_a_small_picture_in_its_own_shape_is_told(tmp_path):
    picture(tmp_path / "a.png", 100, 100)
    _, notes = load(tmp_path, 512, PictureOptions(buckets=True))
    assert notes[0].startswith("a.png: 100 x 100 became 64 x 64") and "of 512 x 512 that were asked for" in notes[0]


def test_a_narrow_strip_in_its_own_shape_has_no_more_than_the_area_asked_for(tmp_path):
    for name, size in (("a", (10000, 8)), ("b", (20, 9000)), ("c", (40, 40)), ("d", (3000, 300))):
        picture(tmp_path / f"{name}.png", *size)
    _, notes = load(tmp_path, 512, PictureOptions(buckets=True))
    became = [re.search(r"became (\d+) x (\d+)", note).groups() for note in notes]
    assert became == [("4096", "64"), ("64", "4096"), ("64", "64"), ("1600", "128")]


def test_a_caption_that_cannot_be_read_is_told(tmp_path):
    picture(tmp_path / "a.png", 64, 64)
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="cannot read the caption .*a.txt"):
        load(tmp_path, 64, PictureOptions())


def test_what_the_system_does_not_let_us_read_is_told(tmp_path, monkeypatch):
    """In its words: neither is damaged.  A folder is no picture, whatever it is called"""
    picture(tmp_path / "a.png", 64, 64)
    (tmp_path / "c.png").mkdir()
    assert len(load(tmp_path, 64, PictureOptions())[0][0].images) == 1
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        UserError, match="cannot read the image .*b.png: No such file or directory; check the file and its perm"
    ):
        load(tmp_path, 64, PictureOptions())

    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(type(tmp_path), "iterdir", closed)
    with pytest.raises(UserError, match=f"cannot read the folder {tmp_path}: Permission denied; check its permissions"):
        load(tmp_path, 64, PictureOptions())


def test_captions_are_templates_and_hold_the_trigger_as_a_word():
    assert complete_captions(["a {trigger} {class}, red", None], "zqx", "cat") == ["a zqx cat, red", "a zqx cat"]
    for unspaced, trigger in (("一只猫娘在笑", "猫娘"), ("รูปไทยสวย", "ไทย")):
        assert complete_captions([unspaced], trigger, "") == [unspaced]
    with pytest.raises(UserError, match="lacks the trigger 'cat'"):
        complete_captions(["a catalogue"], "cat", "")


def test_captions_of_the_class_are_templates_without_the_trigger():
    given = ["a {trigger} {class}, red", None, "an animal"]
    assert captions_of_class(given, "zqx", "cat") == ["a cat, red", "a cat", "an animal"]
    with pytest.raises(UserError, match="the caption 'a Zqx cat' of a regularisation picture has the trigger 'zqx'"):
        captions_of_class(["a Zqx cat"], "zqx", "cat")
    assert captions_of_class(["a tabby"], "zqx", "") == ["a tabby"]
    with pytest.raises(
        UserError, match="the caption 'a {trigger} {class}' of regularisation .* without a class noun: give one"
    ):
        captions_of_class(["a tabby", None], "zqx", "")


def test_a_trigger_beyond_what_the_text_encoder_reads_is_told(model, new_library, tmp_path):
    """The demo model reads 24 tokens"""
    long = "a very long caption " * 8
    captions = {"a": f"{long}zqx cat", "b": f"a zqx cat, {long}", "c": f"seen from far away, a Zqx cat, {long}"}
    for name, caption in captions.items():
        picture(tmp_path / "in" / f"{name}.png", 64, 64)
        (tmp_path / "in" / f"{name}.txt").write_text(caption, encoding="utf-8")
    sets, _ = load(tmp_path / "in", 64, PictureOptions(flip=True))
    config = TrainingConfig(steps=1, **QUICK)
    told, before = [], []
    given = dict(config=config, tell=told.append, on_step=lambda step: before.extend(told))
    assert unread(model, [f"a zqxite, {captions['a']}", captions["b"]], "zqx") == [0]  # within another word it calls nothing
    _, fit = train_concept(model, new_library(tmp_path / "l"), sets, "x", "zqx", "cat", **given)
    said = [n for n in fit.notes if "does not get as far as" in n]
    assert said == before == told  # already when the first step is done
    assert len(said) == 1 and "the trigger 'zqx' in 1 of 3 captions, such as that of a.png: put" in said[0]
    library = new_library(tmp_path / "m")
    with pytest.raises(UserError, match="as far as the trigger 'zqx' in none of the 1 captions"):
        train_concept(model, library, [Pictures(sets[0].images[:1], [captions["a"]])], "x", "zqx", "cat", config=config)
    assert not library.names


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_every_kind_of_model_shows_which_triggers_it_reads(kind, tmp_path):
    from benchmarks.tiny import make_pipeline

    make_pipeline(kind).save_pretrained(tmp_path)
    captions = ["a zqx cat, " + "on a sofa " * 300, "on a sofa " * 300 + "a zqx cat", "seen from very far away, a zqx cat"]
    assert unread(open_folder(tmp_path), captions, "zqx") == [1]


def test_mirror_images_are_counted_once(model, subjects, new_library, tmp_path):
    s = subjects["octopus"]
    pictures = mirrored(Pictures(s.images[:2], s.references.captions[:2]))
    library = new_library(tmp_path / "l")
    concept, _ = train_concept(model, library, [pictures], "o", s.trigger, config=TrainingConfig(steps=1, **QUICK))
    assert concept.adapter.metadata["ss_num_train_images"] == "2"


def test_masks_flips_and_repeats(tmp_path):
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    picture(tmp_path / "a.png", 64, 64, alpha=left)
    picture(tmp_path / "3_face" / "b.png", 64, 64)
    left.save(tmp_path / "3_face" / "b.mask.png")
    (files,), notes = load(tmp_path, 64, PictureOptions(flip=True))
    assert "3_face/: 1 picture, each taken 3 times as often" in notes
    assert files.repeats == [3, 3, 1, 1] and torch.equal(files.images[0].flip(1), files.images[1])
    assert files.masks[0, :, :32].eq(1).all() and files.masks[0, :, 32:].eq(0).all()
    assert torch.equal(files.masks[1], files.masks[0].flip(1)) and files.masks[2].eq(1).all()
    (alpha,), _ = load(tmp_path, 64, PictureOptions(masks="alpha"))
    assert alpha.masks[1, :, :32].eq(1).all() and alpha.masks[1, :, 32:].eq(0).all() and alpha.masks[0].eq(1).all()
    (none,), _ = load(tmp_path, 64, PictureOptions(masks="none"))
    assert none.masks is None and none.repeats == [3, 1]


def test_a_year_is_no_number_of_repeats(tmp_path):
    for name in ("a.png", "2024_summer/b.png", "20240115_birthday/c.png", "999_often/d.png"):
        picture(tmp_path / name, 64, 64)
    (files,), notes = load(tmp_path, 64, PictureOptions())
    assert files.names == ["d.png", "a.png"] and files.repeats == [999, 1]
    assert "folder 2024_summer/ (make it 1_2024_summer/ to read it)" in notes[-1] and "20240115_birthday" in notes[-1]


def test_a_folder_of_many_pictures_is_looked_through_a_few_times_at_most(tmp_path, monkeypatch):
    for name in range(20):
        picture(tmp_path / f"{name}.png", 64, 64)
    looks, real = [], type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda path: looks.append(path) or real(path))
    load(tmp_path, 64, PictureOptions())
    assert 0 < len(looks) < 10


def test_masks_and_captions_that_no_picture_takes_are_told(tmp_path):
    for name in ("cat1.png", "cat_1.mask.png", "Dog.png", "dog.MASK.png"):
        picture(tmp_path / name, 64, 64)
    for name in ("cat1.caption", "Dog.png.txt"):
        (tmp_path / name).write_text("a zqx cat", encoding="utf-8")
    _, notes = load(tmp_path, 64, PictureOptions())
    assert notes[2:] == [
        "not read: 2 captions (Dog.png.txt, cat1.caption; name it NAME.txt beside its picture NAME.png), "
        "1 mask (cat_1.mask.png; name it NAME.mask.png beside its picture NAME.png)"
    ]


def test_pictures_are_in_the_order_that_people_count_in(tmp_path):
    for name in ("10.png", "2.png", "1.png", "b2.png", "b10.png", "a (3).png"):
        picture(tmp_path / name, 64, 64)
    (files,), _ = load(tmp_path, 64, PictureOptions())
    assert files.names == ["1.png", "2.png", "10.png", "a (3).png", "b2.png", "b10.png"]


def test_bad_masks_are_told(tmp_path):
    picture(tmp_path / "a.png", 64, 64)
    Image.new("L", (32, 64), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match="the mask .*a.mask.png is 32 x 64 pixels, its picture 64 x 64"):
        load(tmp_path, 64, PictureOptions())
    Image.new("L", (64, 64), 0).save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match="mask of .*a.png is all black"):
        load(tmp_path, 64, PictureOptions())
    (tmp_path / "a.mask.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the image .*a.mask.png"):
        load(tmp_path, 64, PictureOptions())
    for options, message in (({"masks": "x"}, "masks is 'x'"), ({"resolution": 33}, "resolution is 33")):
        with pytest.raises(UserError, match=message):
            PictureOptions(**options).validate()


def test_training_on_several_sizes_masks_and_pictures_of_the_class(model, new_library, tmp_path):
    """Every batch is of one size, replay is of the library's; what is masked out has no influence at all."""
    folder, mask = tmp_path / "in", Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 64, 64))
    for name in "ab":
        picture(folder / f"{name}.png", 128, 64)
    picture(folder / "c.png", 64, 64)
    picture(tmp_path / "class" / "x.png", 64, 64)
    sets, _ = load(folder, 64, PictureOptions(buckets=True))
    classes, _ = load(tmp_path / "class", 64, PictureOptions())
    assert [tuple(s.images.shape) for s in sets] == [(2, 32, 80, 3), (1, 64, 64, 3)]
    library = new_library(tmp_path / "l")
    config = TrainingConfig(steps=6, caption_dropout=0.2, **QUICK)
    called = [Pictures(classes[0].images, ["a zqx thing"])]
    with pytest.raises(UserError, match="of a regularisation picture has the trigger 'zqx'"):
        train_concept(model, library, sets, "x", "zqx", "thing", config=config, regularisation=called)
    concept, fit = train_concept(model, library, sets, "x", "zqx", "thing", config=config, regularisation=classes)
    assert np.isfinite(fit.losses).all() and len(concept.latents) == 2 and library.load("x").captions == ["a zqx thing"] * 2
    _, second = train_concept(model, library, sets[1:], "y", "vbl", "thing", config=config)  # replays x, of another shape
    assert np.isfinite(second.losses).all() and library.verify() == []


def test_what_a_mask_leaves_out_does_not_count(model, subjects, calibration):
    """The error's gradient with one half masked is that of the other half alone."""
    from seqlora_core.attach import Attachment
    from seqlora_core.captions import Prompts
    from seqlora_core.concept import References
    from seqlora_core.objective import Objective
    from seqlora_core.parallel import Workers
    from seqlora_core.replay import Replay

    s = subjects["octopus"].references
    masks = torch.zeros(len(s.latents), 64, 64)
    masks[:, :, :32] = 1
    config = TrainingConfig(use_decoys=False, replay_weight=0.0, interference_weight=0.0)
    references = References(s.latents, s.captions, s.size, masks)
    replay = Replay(model, references, "octzu", [], calibration, config)
    prompts = Prompts(model, s.captions, "octzu", config)
    objective = Objective(
        model, [references], [prompts], replay, [], None, Attachment(), config, torch.Generator().manual_seed(0), Workers()
    )
    batch, again = objective.draw()
    prediction = model.predict(batch.noised, batch.sigma, batch.conditioning).detach()
    half = (prediction - batch.target)[..., :4].square().mean()
    assert again == [] and ((prediction - batch.target).square() * batch.weight).mean() == pytest.approx(half.item(), rel=1e-5)
