"""Writes every workflow from one readable description: UI JSON here, API JSON in api/, blueprints in ../subgraphs.

    python -m workflows.build

Pictures of them: `python -m workflows.pictures`.
"""

from __future__ import annotations

import json
from pathlib import Path

from .graph import Graph

HERE = Path(__file__).resolve().parent
LIBRARY = "workflow_demo"
TALL = 700  # a Train Concept with its preview
# subject: (trigger, class noun)
SUBJECTS = {"octopus": ("octzu", "animal"), "penguin": ("pengvo", "animal"), "fox": ("foxqi", "animal")}
OWN_MODEL = (
    "Runs as it is on the pack's tiny demo model.\n\nFor your own checkpoint: put Load Checkpoint in the place of Demo "
    "Model, name your picture folders, set Concept Images and the empty latent to your model's size, take Upscale Image By "
    "out where there is one, and use a new library name.\n\nTaught already? Delete the teaching nodes and let a Library node "
    "take their place."
)


OWN_LORAS = (
    "Runs as it is on the pack's tiny demo model.\n\nFor your own: put Load Checkpoint in the place of Demo Model, choose two "
    "LoRAs that were made for it (a third: one more Concept node), write what calls each into Calibrate, change the prompt, "
    "set Calibrate and the empty latent to your model's size, and take both Upscale Image By out."
)


def base(graph: Graph, text: str, own: str = OWN_MODEL) -> None:
    graph.add("base", "SeqLoRADemoModel", (40, 40), (260, 80))
    graph.note(f"{text}\n\n{own}", (40, 170), (260, 380))


def teach(graph: Graph, subject: str, x: int, y: int, after: str | None = None) -> None:
    """Adds a Train Concept named after its subject; a library grows one after another, so `after` makes it wait.

    Planned for five: two percent of drift among 32 leave each too little to be known on the demo model (docs/RESULTS.md).
    """
    trigger, noun = SUBJECTS[subject]
    graph.add(
        f"{subject}_images", "SeqLoRAConceptImages", (x, y), (320, 170), folder=f"demo/{subject}", resolution=64, captions=""
    )
    graph.add(
        subject, "SeqLoRATrainConcept", (x + 370, y), (360, 520), f"Teach {subject}",
        model=("base", 0), clip=("base", 1), vae=("base", 2), images=(f"{subject}_images", 0), library=LIBRARY,
        name=subject, trigger=trigger, class_noun=noun, rank=4, steps=320, learning_rate=0.004, interference_weight=1.0,
        seed=0, if_trained="use it", batch_size=8, preview_every=50, planned_concepts=5, drift_budget=0.02,
        **({"after": (after, 0)} if after else {}),
    )  # fmt: skip


def teach_series(graph: Graph, subjects: list[str], x: int = 350, y: int = 40) -> str:
    """Teaches them in order; the last one's name."""
    for i, subject in enumerate(subjects):
        teach(graph, subject, x, y + TALL * i, subjects[i - 1] if i else None)
    return subjects[-1]


def draw(
    graph: Graph, stack: tuple[str, int], text: str | tuple[str, int], x: int, y: int, seed: int = 1, mode: str = "sum",
    name: str = "",
) -> None:  # fmt: skip
    """Apply Stack, prompts, sampler and an enlarged picture.  name: of this branch, in a graph that draws more than once."""

    def own(label: str) -> str:
        return f"{name} {label}".strip()

    graph.add(
        own("apply"), "SeqLoRAApplyStack", (x, y), (320, 170), name, model=("base", 0), clip=("base", 1), stack=stack, mode=mode,
        amount=1.0,
    )  # fmt: skip
    clip = (own("apply"), 1)
    graph.add(own("positive"), "CLIPTextEncode", (x + 370, y), (360, 130), "Prompt", clip=clip, text=text)
    graph.add(own("negative"), "CLIPTextEncode", (x + 370, y + 180), (360, 100), "Negative prompt", clip=clip, text="")
    if "latent" not in graph.nodes:
        graph.add(
            "latent", "EmptySD3LatentImage", (x + 370, y + 330), (360, 110), "Empty latent", width=64, height=64, batch_size=4
        )
    graph.add(
        own("sampler"), "KSampler", (x + 780, y), (320, 270), model=(own("apply"), 0), positive=(own("positive"), 0),
        negative=(own("negative"), 0), latent_image=("latent", 0), seed=seed, steps=20, cfg=4.0, sampler_name="euler",
        scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph.add(own("decode"), "VAEDecode", (x + 780, y + 320), (320, 60), samples=(own("sampler"), 0), vae=("base", 2))
    graph.add(
        own("bigger"), "ImageScaleBy", (x + 780, y + 430), (320, 110),
        image=(own("decode"), 0), upscale_method="bicubic", scale_by=4.0,
    )  # fmt: skip
    graph.add(
        own("save"), "SaveImage", (x + 1150, y), (420, 460), name, images=(own("bigger"), 0),
        filename_prefix=f"seqlora/{graph.title}{'_' if name else ''}{name.replace(' ', '_')}",
    )  # fmt: skip


def teach_a_concept() -> Graph:
    graph = Graph("teach_a_concept")
    base(graph, "Teaches one concept and adds it to a library.")
    teach(graph, "octopus", 350, 40)
    graph.add("samples", "PreviewImage", (1140, 40), (420, 400), "References | alone | in the library", images=("octopus", 3))
    graph.add("curves", "PreviewImage", (1140, 490), (420, 280), "Loss and interference", images=("octopus", 2))
    return graph


def teach_a_series() -> Graph:
    graph = Graph("teach_a_series")
    base(graph, "Teaches three concepts, each beside all earlier ones. 'after' keeps the order.")
    last = teach_series(graph, ["octopus", "penguin", "fox"])
    for i, subject in enumerate(SUBJECTS):
        graph.add(f"{subject}_samples", "PreviewImage", (1140, 40 + TALL * i), (420, 400), subject, images=(subject, 3))
    graph.add("report", "SeqLoRAInterferenceReport", (1610, 40), (420, 520), stack=(last, 0))
    return graph


def teach_then_draw() -> Graph:
    graph = Graph("teach_then_draw")
    base(graph, "Teaches a concept (once: later runs use it), then draws with all of the library.")
    teach(graph, "octopus", 350, 40)
    draw(graph, ("octopus", 0), "an octzu animal, blue background", 1140, 40)
    return graph


def stack_and_draw() -> Graph:
    graph = Graph("stack_and_draw")
    base(graph, "Two concepts in one picture. Each is taught once; later runs use what is in the library.")
    last = teach_series(graph, ["octopus", "penguin"])
    draw(
        graph, (last, 0), "an octzu animal on the left and a pengvo animal on the right, yellow background", 1140, 40, seed=3
    )  # fmt: skip
    graph.add("report", "SeqLoRAInterferenceReport", (1140, 690), (420, 520), stack=(last, 0))
    return graph


def stack_a_library() -> Graph:
    graph = Graph("stack_a_library")
    base(
        graph,
        "Draws with every concept of a library. Have one already? Delete the teaching nodes and type its name into Library.",
    )
    last = teach_series(graph, ["octopus", "penguin", "fox"])
    graph.add("library", "SeqLoRALibrary", (1140, 40), (320, 200), stack=(last, 0), library=LIBRARY, concepts="", strength=1.0)
    draw(graph, ("library", 0), "a foxqi animal, green background", 1510, 40)
    return graph


def inspect_interference() -> Graph:
    graph = Graph("inspect_interference")
    base(graph, "Who disturbs whom, before any picture is drawn: each row says what one concept does to the others' inputs.")
    last = teach_series(graph, ["octopus", "penguin", "fox"])
    graph.add("report", "SeqLoRAInterferenceReport", (1140, 40), (460, 560), stack=(last, 0))
    graph.add("matrix", "PreviewImage", (1650, 40), (520, 480), "Interference", images=("report", 1))
    return graph


def export_one_lora() -> Graph:
    graph = Graph("export_one_lora")
    base(graph, "Writes all concepts as one ordinary LoRA into models/loras. Any loader reads it: LoraLoader, at strength 1.")
    last = teach_series(graph, ["octopus", "penguin"])
    graph.add(
        "save", "SeqLoRASaveStack", (1140, 40), (360, 220),
        stack=(last, 0), name="seqlora_demo_stack", mode="sum", amount=1.0, overwrite=True,
    )  # fmt: skip
    return graph


def bring_your_own_loras() -> Graph:
    graph = Graph("bring_your_own_loras")
    base(
        graph, "Two LoRAs that were trained apart, by other programs: drawn as a plain sum and projected, same seed.", OWN_LORAS
    )
    stack, calls = None, []
    for i, subject in enumerate(("penguin", "fox")):
        trigger, noun = SUBJECTS[subject]
        graph.add(
            subject, "SeqLoRAConcept", (350, 40 + 330 * i), (340, 280), f"LoRA {i + 1}", library="", name="", strength=1.0,
            lora=f"seqlora_demo_{subject}.safetensors", **({"stack": stack} if stack else {}),
        )  # fmt: skip
        stack = (subject, 0)
        calls.append(f"seqlora_demo_{subject}: {trigger} {noun}")
    graph.add(
        "calibrate", "SeqLoRACalibrate", (740, 40), (360, 380), model=("base", 0), clip=("base", 1), vae=("base", 2), loras="",
        triggers="\n".join(calls), resolution=64, pictures=0, seed=0, stack=stack,
    )  # fmt: skip
    graph.add("report", "SeqLoRAInterferenceReport", (740, 470), (360, 500), stack=("calibrate", 0))
    graph.add(
        "prompt", "PrimitiveStringMultiline", (1150, 350), (320, 110), "Prompt of both", value="a foxqi animal, blue background"
    )
    draw(graph, ("calibrate", 0), ("prompt", 0), 1150, 40, name="plain sum")
    draw(graph, ("calibrate", 0), ("prompt", 0), 1150, 700, mode="data", name="projected")
    return graph


WORKFLOWS = [
    teach_a_concept, teach_a_series, teach_then_draw, stack_and_draw, stack_a_library, inspect_interference, export_one_lora,
    bring_your_own_loras,
]  # fmt: skip


def teach_blueprint() -> dict:
    """Pictures and Train Concept as one node."""
    graph = Graph("SeqLoRA teach")
    teach(graph, "octopus", 0, 0)
    names = ("model", "clip", "vae", "library", "name", "trigger", "class_noun")
    images = {key: ("octopus_images", key) for key in ("folder", "resolution")}
    after = {"after": ("octopus", "after")}
    outputs = {"stack": ("octopus", 0), "report": ("octopus", 1), "curves": ("octopus", 2), "samples": ("octopus", 3)}
    return _unlinked(graph).blueprint({n: ("octopus", n) for n in names} | images | after, outputs)


def stack_blueprint() -> dict:
    """A library, its report and Apply Stack as one node."""
    graph = Graph("SeqLoRA stack")
    graph.add("library", "SeqLoRALibrary", (0, 0), (320, 200), library="my_library", concepts="", strength=1.0)
    graph.add("apply", "SeqLoRAApplyStack", (370, 0), (320, 170), stack=("library", 0), mode="sum", amount=1.0)
    inputs = {
        "model": ("apply", "model"), "clip": ("apply", "clip"), "library": ("library", "library"),
        "concepts": ("library", "concepts"), "strength": ("library", "strength"),
    }  # fmt: skip
    return graph.blueprint(inputs, {"model": ("apply", 0), "clip": ("apply", 1), "triggers": ("apply", 2)})


def _unlinked(graph: Graph) -> Graph:
    """Without links to nodes that are not in it: a blueprint's own inputs take their place."""
    for node in graph.nodes.values():
        node["inputs"] = {k: v for k, v in node["inputs"].items() if not isinstance(v, tuple) or v[0] in graph.nodes}
    return graph


BLUEPRINTS = [teach_blueprint, stack_blueprint]


def as_text(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def build(folder: Path = HERE.parent) -> None:
    """Writes FOLDER/workflows, FOLDER/workflows/api and FOLDER/subgraphs."""
    pages, prompts, blueprints = folder / "workflows", folder / "workflows" / "api", folder / "subgraphs"
    for path in (prompts, blueprints):
        path.mkdir(parents=True, exist_ok=True)
    for make in WORKFLOWS:
        graph = make()
        (pages / f"{graph.title}.json").write_text(as_text(graph.ui()), encoding="utf-8", newline="\n")
        (prompts / f"{graph.title}.json").write_text(as_text(graph.api()), encoding="utf-8", newline="\n")
    for make in BLUEPRINTS:
        data = make()
        name = data["nodes"][0]["title"]
        (blueprints / f"{name}.json").write_text(as_text(data), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    build()
