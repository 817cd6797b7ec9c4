"""What can be chosen in meta-training, and recipes: the papers' systems, and ours."""
import argparse
import dataclasses

import numpy as np

import estimators
import evaluate
import model
import objective
import tasks
from evaluate import SEED, number

COUNT = number(int, 1, 2 ** 31 - 1)
STEPS, SOME = number(int, 1, 10 ** 7), number(int, 0, 10 ** 5)  # of what takes memory
POSITIVE = number(float, 1e-30)
ESTIMATORS = "truncated_backprop", "es", "merged", "pes", "combined"


def some_of(known):
    """An argparse type: names among the known, joined by commas, or all -> a tuple."""
    def parse(text):
        names = tuple(known) if text == "all" else tuple(text.split(","))
        if set(names) <= set(known) and len(set(names)) == len(names):
            return names
        raise argparse.ArgumentTypeError(f"must be all, or some of {','.join(known)}, not {text}")
    return parse


FAMILIES = some_of(tasks.FAMILIES)


# ---------------------------------------------------------------- recipes

LEFT_OUT = {  # additions of this project to the training, and what leaves them out
    "bounded_adjoint": dict(adjoint=np.inf, clip=np.inf),
    "falling_rate": dict(warmup=1, decay_steps=np.inf),
    "averaging": dict(averaging="last"), "end_root": dict(outer_loss="mean"),
    "caution": dict(caution=1.0)}
ADDITIONS = (*model.ADDITIONS, *LEFT_OUT)
SUITED = {  # to each estimator: long unrolls, since each earlier truncation adds its noise
    "es": dict(sigma=0.01, outer_steps=800, decay_steps=200.0),
    "pes": dict(sigma=0.03, outer_steps=1600, decay_steps=200.0, truncation=200),
    "merged": dict(sigma=0.01, outer_steps=160),
    "combined": dict(sigma=0.01, outer_steps=160)}
PAPERS = dict(without=ADDITIONS, sigma=0.01, jitter=0.2, outer_batches=5, learning_rate=3e-3,
              outer_steps=10 ** 5)
RECIPES = {  # whole systems: the papers', as far as ten minutes reach, and ours
    "ours": {},
    "p1": PAPERS | dict(optimizer="p1", estimator="merged", num_pairs=4, truncation=200,
                        shortest=50, growing=100, b1=0.5),
    "p2": PAPERS | dict(optimizer="p2", estimator="es", num_pairs=16, truncation=40,
                        num_tasks=256, outer_loss="normalised")}


def flag(default, why):
    return dataclasses.field(default=default, metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag; its annotation is a type for argparse, or the choices. Flags that are
    given come first, then the recipe, then what is left out, then what suits the estimator."""
    recipe: tuple(RECIPES) = flag("ours", "whose system: it sets all flags that you don't")
    without: some_of(ADDITIONS) = flag(
        (), "additions to leave out, or all, in place of the recipe's list; other flags win")
    tasks: FAMILIES = flag(("mlp",), "families, joined by commas, or all")
    num_tasks: SOME = flag(0, "size of a fixed pool, Adam tuned on it (0: ever new)")
    few: number(float, 0, 1) = flag(0.0, "share of tasks with few examples to learn from")
    optimizer: tuple(model.LEARNED) = flag("hierarchical", "what to meta-train")
    estimator: ESTIMATORS = flag("truncated_backprop", "of the meta-gradient")
    target: tuple(objective.TARGETS) = flag("valid", "the loss it is for, held out or training")
    outer_loss: tuple(objective.OUTER_LOSSES) = flag("end_root", "what a loss counts")
    outer_batches: number(int, 1, 1000) = flag(1, "batches of it after each inner step")
    outer_steps: COUNT = flag(320, "updates of theta in all; a finished run can go on with more")
    minutes: POSITIVE = flag(7.8, "stop learning then; from each launch, compiling included")
    save_seconds: POSITIVE = flag(30.0, "time between two saves")
    seed: SEED = flag(0, "of theta, tasks and noise")
    horizon: STEPS = flag(model.HORIZON, "T, inner steps of an episode")
    truncation: STEPS = flag(model.HORIZON, "K, inner steps of an unroll; none is cut off if K = T")
    shortest: STEPS = flag(10 ** 7, "K at first, if that is less; it grows to --truncation")
    growing: COUNT = flag(1000, "outer steps in which it grows")
    jitter: number(float, 0, 0.9) = flag(0.0, "each K is drawn, within this share of it")
    num_pairs: number(int, 1, 10 ** 5) = flag(2, "N, antithetic pairs (single ones if sigma is 0)")
    sigma: number(float, 0) = flag(0.0, "deviation of the noise on theta; 0 for backprop alone")
    adjoint: POSITIVE = flag(1.0, "largest norm of what goes back, step by step, on parameters")
    clip: POSITIVE = flag(0.3, "largest norm of one pair's pathwise gradient")
    learning_rate: number(float, 1e-30, 1e9) = flag(6e-3, "of the outer Adam at its start")
    b1: number(float, 0, 0.999) = flag(0.9, "of the outer Adam, the decay of its momentum")
    warmup: COUNT = flag(10, "outer steps in which its rate rises")
    decay_steps: POSITIVE = flag(32.0, "outer steps that halve that rate; then like 1 / step")
    averaging: ("later", "last") = flag("later", "of theta: the later count more, or the last only")
    caution: number(float, 1e-3, 1e3) = flag(0.7, "anchored steps handed out, over those learned")
    begin: str = flag("", "theta.npz of the same optimizer, to go on from")
    outer_optimizer: str = flag("", "theta.npz of a learned optimizer in the outer Adam's place")
    compare: number(int, 4, 10 ** 5) = flag(64, "held-out tasks of each, compared at the end")


def whole_settings(chosen):
    """The Settings in which some were chosen. ValueError if they don't go together."""
    wanted = RECIPES[chosen.get("recipe", "ours")] | chosen
    suited = SUITED.get(wanted.get("estimator"), {})
    horizon = wanted.get("horizon", model.HORIZON)
    others = suited | {"truncation": min(suited.get("truncation", horizon), horizon)}
    for name in wanted.get("without", ()):
        others |= LEFT_OUT.get(name, {})
    settings = Settings(**others | wanted)
    if settings.horizon % evaluate.EVERY:
        raise ValueError(f"--horizon must be a multiple of {evaluate.EVERY}.")
    weight = getattr(estimators, settings.estimator).keywords["weight"]
    estimators.check(weight, settings.num_pairs, settings.truncation, settings.horizon,
                     settings.sigma)  # before Adam is tuned on a pool
    if settings.few and not tasks.OF_EXAMPLES & {*settings.tasks}:
        raise ValueError(f"--few is for {', '.join(sorted(tasks.OF_EXAMPLES))}: leave it out.")
    return settings


def arguments(settings):
    """Of the optimizer to be learned; saved with it."""
    without = tuple(name for name in model.ADDITIONS if name in settings.without)
    return model.known(settings.optimizer, horizon=settings.horizon, without=without)


def make_family(settings, name):
    return tasks.few_examples(tasks.FAMILIES[name](), settings.few)


def make_learned(settings):
    return model.made(settings.optimizer, **arguments(settings))
