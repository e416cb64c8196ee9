"""The trigger's own embeddings: what is learnt of them, what they touch, and what every way of stacking does with them."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seqlora_core import cli
from seqlora_core.adapter import Adapter, LayerDelta, concatenate, is_token_table, load_adapter
from seqlora_core.attach import Attachment, Site, attached
from seqlora_core.composition import MODES, energy_kept, project
from seqlora_core.concept import Concept
from seqlora_core.config import Checkpointing, TrainingConfig
from seqlora_core.demo_model import DEMO_MODEL, DemoModel
from seqlora_core.embedding import trigger_embedding
from seqlora_core.errors import UserError
from seqlora_core.learnt_trigger import LearntTrigger, tokens_of
from seqlora_core.low_rank import truncated
from seqlora_core.preview import sample_sheet
from seqlora_core.report import interference_report
from seqlora_core.spectrum import capped
from seqlora_core.teach import train_concept
from seqlora_core.trainer import _other_prompts

CONFIG = TrainingConfig(steps=6, batch=2, replay_batch=4, learn_trigger=True, rank=2)
TABLE = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"


@pytest.fixture(scope="module")
def own():
    return DemoModel()


def learn(model, library, subject, config=CONFIG, **options):
    s = subject
    return train_concept(model, library, s.images, s.name, s.trigger, s.class_noun, s.references.captions, config, **options)


@pytest.fixture(scope="module")
def taught(own, subjects, new_library, tmp_path_factory):
    library = new_library(tmp_path_factory.mktemp("trigger") / "library", planned=4)
    for name in ("octopus", "penguin"):
        learn(own, library, subjects[name])
    return library


def prediction(model, adapter, prompts):
    model.adapt_text(False, tokens=True)
    x, sigma = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((len(prompts),), 0.5)
    attachment = Attachment()
    attachment.set_frozen(adapter)
    with torch.no_grad(), attached(model.sites(), attachment):
        return model.predict(x, sigma, model.encode_prompts(prompts))


def tables(adapter):
    return replace(adapter, layers={n: d for n, d in adapter.layers.items() if is_token_table(n)})


def test_of_a_short_trigger_a_longer_one_is_proposed_and_of_that_nothing(own):
    own.adapt_text(False, tokens=True)
    (told,) = LearntTrigger(own, "octzu", ["a castle"], 0.1).notes("octzu")
    found = re.fullmatch(
        r"the trigger 'octzu' has 2 tokens of its own to learn: one of 8 or more, such as '([a-z ]+)', .*", told
    )
    longer = LearntTrigger(own, found[1], ["a castle"], 0.1)
    assert len(longer.tokens[TABLE]) >= 8 and longer.notes(found[1]) == []


def test_only_the_triggers_own_tokens_are_learnt(own, taught, subjects):
    for concept in taught.concepts():
        up = concept.adapter.layers[TABLE].up
        learnt = set(up.any(1).nonzero().flatten().tolist())
        assert learnt and learnt <= tokens_of(own, [concept.trigger])[TABLE]
        assert up.sum() == len(learnt) and not learnt & tokens_of(own, ["an animal, red background", ""])[TABLE]
    first, second = (c.adapter.layers[TABLE].up.any(1) for c in taught.concepts())
    assert not (first & second).any()


def test_a_prompt_without_the_trigger_is_left_as_it_is_to_the_last_bit(own, taught):
    first, prompts = tables(taught.concepts()[0].adapter).scaled(30.0), ["an octzu animal", "a castle", "an animal"]
    moved, bare = prediction(own, first, prompts), prediction(own, None, prompts)
    assert torch.equal(moved[1:], bare[1:])
    assert (moved[0] - bare[0]).abs().mean() > 1e-3


def test_a_token_that_others_have_is_not_the_triggers(own):
    with pytest.raises(UserError, match="every token of the trigger 'octzu' is also in other prompts or triggers"):
        LearntTrigger(own, "octzu", ["an octzu animal"], 0.1)


def test_the_usual_rare_word_can_be_learnt_although_decoys_have_it(own, taught, subjects, tmp_path, new_library):
    s, library = subjects["fox"], new_library(tmp_path / "library")
    captions = [c.replace(s.trigger, "ohwx") for c in s.references.captions]
    concept, _ = train_concept(own, library, s.images, "fox", "ohwx", s.class_noun, captions, replace(CONFIG, steps=2))
    assert TABLE in concept.adapter.layers


def test_a_trigger_that_captions_spell_in_capitals_can_be_learnt(own, subjects, tmp_path, new_library):
    s, library = subjects["fox"], new_library(tmp_path / "library")
    captions = [c.replace(s.trigger, s.trigger.capitalize()) for c in s.references.captions]
    concept, _ = train_concept(own, library, s.images, "fox", s.trigger, s.class_noun, captions, replace(CONFIG, steps=2))
    assert TABLE in concept.adapter.layers


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(own, subjects, new_library, tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step.number == 3:
            raise Stop

    whole, parts = (new_library(tmp_path / n, planned=4) for n in ("whole", "parts"))
    learn(own, whole, subjects["octopus"])
    learn(own, parts, subjects["octopus"], on_step=stop, checkpointing=Checkpointing(every=2))
    learn(own, parts, subjects["octopus"])
    assert whole.paths("octopus")[0].read_bytes() == parts.paths("octopus")[0].read_bytes()


def test_later_concepts_without_it_are_trained_beside_it(own, taught, subjects):
    concept, _ = learn(own, taught, subjects["fox"], replace(CONFIG, learn_trigger=False))
    assert TABLE not in concept.adapter.layers
    taught.remove("fox")


@pytest.mark.parametrize("mode", MODES)
def test_no_projection_touches_it(taught, mode):
    concepts = taught.concepts()
    adapters = [c.adapter for c in concepts]
    projected = project(adapters, mode, 1.0, [c.moments for c in concepts], taught.calibration().moments)
    for before, after in zip(adapters, projected):
        assert torch.equal(after.layers[TABLE].dense(), before.layers[TABLE].dense())
    assert energy_kept(adapters[0], projected[0]) == pytest.approx(
        energy_kept(adapters[0].without_token_tables(), projected[0].without_token_tables())
    )
    assert torch.equal(capped(adapters[0], 1.0).layers[TABLE].down, adapters[0].layers[TABLE].down)


def test_reports_and_ranks_are_of_the_other_layers(taught):
    adapters = {c.name: c.adapter for c in taught.concepts()}
    plain = {n: a.without_token_tables() for n, a in adapters.items()}
    assert interference_report(adapters) == interference_report(plain)
    cut, _ = truncated(concatenate(list(adapters.values())), 1)
    assert torch.allclose(cut.layers[TABLE].dense(), sum(a.layers[TABLE].dense() for a in adapters.values()))
    assert load_adapter(taught.paths("octopus")[0]).metadata["ss_network_dim"] == "2"


def test_a_contact_sheet_of_a_concept_that_was_there_shows_it_too(own, taught):
    references = torch.zeros(1, 64, 64, 3)
    own.adapt_text(False, tokens=True)  # as training left it
    trained = sample_sheet(own, taught, "octopus", references, 1)
    own.adapt_text(False)  # as a model is that was opened anew
    assert torch.equal(sample_sheet(own, taught, "octopus", references, 1), trained)


def test_a_file_does_what_was_trained(own, taught):
    concept = taught.concepts()[0]
    read = load_adapter(taught.paths(concept.name)[0])
    assert torch.equal(prediction(own, read, ["an octzu animal"]), prediction(own, concept.adapter, ["an octzu animal"]))
    assert f"{TABLE}.weight".removeprefix("text_encoders.") in {
        k.removeprefix("text_encoders.") for k in _keys(DEMO_MODEL)
    }  # the name that the checkpoint, and so ComfyUI, has for it


def test_diffusers_reads_the_file_without_the_table_and_refuses_it_with_it(new_library, tmp_path):
    from benchmarks.tiny import make_pipeline
    from seqlora_core.calibration import calibrate
    from seqlora_core.library import Library
    from seqlora_core.unet_model import UNetModel

    model = UNetModel(make_pipeline("sdxl"))
    library = Library(tmp_path / "library", model.fingerprint(), 4, create=True)
    library.keep_calibration(calibrate(model, (model.size, model.size), 4))
    images = torch.rand(2, model.size, model.size, 3, generator=torch.Generator().manual_seed(0))
    concept, _ = train_concept(model, library, images, "toy", "octzu", config=replace(CONFIG, steps=2, learning_rate=0.1))
    assert sum(map(is_token_table, concept.adapter.layers)) == 2  # of both text encoders
    file, plain = str(library.paths("toy")[0]), tmp_path / "plain.safetensors"
    assert cli.main(["stack", file, "--layers=-token_embedding", "--output", str(plain)]) == 0
    with pytest.raises(ValueError, match="lora"):
        model.pipeline.load_lora_weights(tmp_path / "library", weight_name="toy.safetensors")
    model.pipeline.load_lora_weights(tmp_path, weight_name="plain.safetensors")
    assert model.pipeline.get_list_adapters() == {"unet": ["default_0"]}


def _keys(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_trigger_alone_is_learnt_beside_concepts_that_have_layers(own, taught, subjects):
    """Nothing else ever changes: no layer of the model, no other prompt, nothing of what other concepts do"""
    alone = replace(CONFIG, layers="@trigger", steps=20)
    concept, fit = learn(own, taught, subjects["fox"], alone)
    assert list(concept.adapter.layers) == [TABLE] and concept.bases == {} and len(fit.losses) == 20
    said = concept.adapter.metadata
    assert said["seqlora.replay_weight"] == "0.0" and json.loads(said["seqlora.constraint"]) == {"lora_down": "free", "to": []}
    assert sum(fit.losses[-5:]) < sum(fit.losses[:5])
    prompts = ["a castle", *(f"a {subjects[name].trigger} animal" for name in ("octopus", "fox"))]
    moved, bare = prediction(own, concept.adapter, prompts), prediction(own, None, prompts)
    assert torch.equal(moved[:2], bare[:2]) and (moved[2] - bare[2]).abs().mean() > 1e-3
    concepts = taught.concepts()
    adapters = [c.adapter for c in concepts]
    for mode in MODES:
        projected = project(adapters, mode, 1.0, [c.moments for c in concepts], taught.calibration().moments)
        assert torch.equal(projected[-1].layers[TABLE].dense(), adapters[-1].layers[TABLE].dense())
    with_it, without = (
        interference_report({c.name: c.adapter for c in some}, {c.name: c.moments for c in some})
        for some in (concepts, concepts[:2])
    )
    assert with_it.crosstalk[2] == [0, 0, 0] and with_it.disturbance[:2] == pytest.approx(without.disturbance)
    assert sample_sheet(own, taught, "fox", subjects["fox"].images).isfinite().all()
    taught.remove("fox")


def test_the_trigger_alone_needs_learn_trigger():
    with pytest.raises(UserError, match="turn learn_trigger on"):
        TrainingConfig(layers="@trigger").validate()


class Spaced:
    """A text encoder whose words begin otherwise after a space, and in capitals, as Qwen's and others' do: pairs of letters"""

    device = torch.device("cpu")

    def __init__(self):
        self.table, self.pieces = torch.nn.Embedding(200, 4), {}
        self.site = Site("text_encoders.qwen.embed_tokens", (self.table,), 4, 200)

    def token_tables(self):
        return [self.site]

    def tokens(self, text):
        words = re.findall(r" ?[A-Za-z]+| ?[^A-Za-z ]| ", text)
        pieces = [part for w in words for part in re.findall(r" ?\S{1,2}| ", w)]
        return [self.pieces.setdefault(p, len(self.pieces)) for p in pieces]

    def read_prompts(self, prompts):
        for prompt in prompts:
            self.table(torch.tensor(self.tokens(prompt), dtype=torch.long))

    def said(self, ids):
        return {p for p, i in self.pieces.items() if i in ids}


def test_what_is_learnt_are_the_tokens_that_captions_have():
    """And not those of what stands beside the trigger in them"""
    encoder, captions = Spaced(), ["a photo of krpo dog", "a photo of Krpo, red", "krpo dog"]
    learnt = LearntTrigger(encoder, "krpo", ["a photo of  dog", "a photo of , red", " dog", "Shpo"], 0.1, captions)
    assert encoder.said(learnt.tokens[encoder.site.name]) == {"kr", " kr", " Kr"}  # "po" is the other's
    assert "has 1 token of its own" in learnt.notes("krpo")[0]  # wherever it stands
    plain = LearntTrigger(encoder, "krpo", ["Shpo"], 0.1)
    assert encoder.said(plain.tokens[encoder.site.name]) == {"kr"}


def test_an_embedding_is_of_the_tokens_that_were_learnt():
    encoder = Spaced()
    after, trigger = encoder.tokens(" krpo"), "krpo"
    up, change = torch.zeros(200, len(after)), torch.randn(len(after), 4, generator=torch.Generator().manual_seed(0))
    up[after, range(len(after))] = 1.0
    adapter = Adapter({encoder.site.name: LayerDelta(change, up)})
    (rows,) = trigger_embedding(encoder, adapter, trigger).values()
    assert torch.allclose(rows, encoder.table.weight[after] + change)


def test_an_earlier_concepts_trigger_is_held_after_a_space_too(own, subjects, calibration):
    s, earlier = subjects["octopus"].references, [Concept("one", "krpo", "", Adapter({}), None, {}, torch.zeros(0), [])]
    replay = SimpleNamespace(texts=[])
    assert {"krpo", "a krpo"} < set(_other_prompts([s], "octzu", earlier, calibration, replay))
