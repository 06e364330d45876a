"""What a report says, as tables of text; pictures are in ``figures.py``. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from distributed_lm.evaluation.early_tokens import context_curve, decompose
from distributed_lm.study.claims import Verdict, judge_claims
from distributed_lm.study.measures import Measures, RunSet
from distributed_lm.study.schema import Study
from distributed_lm.study.statistics import Estimate, paired
from distributed_lm.tracking.metrics_file import read_records

SYMBOLS = {"holds": "✓", "does not hold": "✗", "cannot tell": "?"}


@dataclass(frozen=True)
class Table:
    """A caption, heads and rows of text."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""
    name: str = ""
    """Of the table at W&B."""


@dataclass(frozen=True)
class Content:
    """Everything in a report but its pictures."""

    title: str
    description: str
    corpus: str = ""
    claims: Table | None = None
    tables: list[Table] = field(default_factory=list)
    setup: list[tuple[str, str]] = field(default_factory=list)


def study_content(study: Study) -> Content:
    """Of a whole study."""
    measures = Measures(study)
    tables = [
        extrapolation_table(measures),
        early_token_table(measures),
        _paper_table(study),
        _equal_time_table(study, measures),
        _speed_table(study, measures),
        _tuning_table(measures),
    ]
    return Content(
        title=study.name,
        description=study.description,
        corpus=study.corpus,
        claims=_claims_table(judge_claims(study, measures)) if study.claims else None,
        tables=[table for table in tables if table is not None and table.rows],
        setup=[
            ("again", " ".join(["distributed-lm study", str(study.path), *study.overrides])),
            ("seeds", ", ".join(map(str, study.seeds))),
            *setup_of(measures),
        ],
    )


def runs_content(title: str, runs: RunSet) -> Content:
    """Of any runs, without claims."""
    tables = [extrapolation_table(runs), early_token_table(runs)]
    return Content(title, "", tables=[one for one in tables if one.rows], setup=setup_of(runs))


def extrapolation_table(runs: RunSet) -> Table:
    lengths = runs.lengths()
    rows = []
    for arm in runs.arms:
        cells = [_perplexity(runs.mean_loss(arm, length)) for length in lengths]
        gaps = [_gap(runs, arm, length) for length in lengths]
        trained = runs.any_config(arm).data.sequence_length
        rows.append(
            [arm, str(trained), *(gap or cell for gap, cell in zip(gaps, cells, strict=True))]
        )
    scored = {
        result.tokens_scored
        for arm in runs.arms
        for seed in runs.seeds_of(arm)
        for result in runs.results(arm, seed)
        if result.protocol == "nonoverlapping" and not result.gap
    }
    counts = " or ".join(f"{count:,}" for count in sorted(scored))
    return Table(
        "Perplexity by context length",
        ["arm", "trained at", *map(str, lengths)],
        rows,
        f"Nonoverlapping, {counts} tokens scored; mean over the seeds, and half the width of its "
        "95% interval.",
        "extrapolation",
    )


def early_token_table(runs: RunSet) -> Table:
    """How much of the gain from L to 2L is merely fewer tokens with little context."""
    rows = []
    for arm in runs.arms:
        length = runs.any_config(arm).data.sequence_length
        scored = [
            [one for one in runs.results(arm, seed, "context") if not one.gap]
            for seed in runs.seeds_of(arm)
        ]
        found = [
            decompose(context_curve(results), length, 2 * length)
            for results in scored
            if {length, 2 * length} <= {one.length for one in results}
        ]
        if found:
            parts = [
                paired([getattr(one, part).nats for one in found])
                for part in ("gain", "fewer_early_tokens", "longer_context")
            ]
            rows.append([arm, f"{length} → {2 * length}", *(_nats(part) for part in parts)])
    return Table(
        "Longer context, or fewer early tokens?",
        ["arm", "lengths", "gain (nats)", "of it fewer early tokens", "of it longer context"],
        rows,
        "Of nonoverlapping segments, from a sample of tokens scored at many contexts: what there "
        "would be to gain if tokens with more than L tokens of context were predicted as well as "
        "with L, and the rest. 95% intervals over the seeds.",
        "early_tokens",
    )


def _nats(estimate: Estimate) -> str:
    low, high = estimate.interval()
    interval = "" if math.isinf(low) else f" [{low:+.4f}, {high:+.4f}]"
    return f"{estimate.mean:+.4f}{interval}"


def setup_of(runs: RunSet) -> list[tuple[str, str]]:
    """Layout, machine, versions, data: from the runs' own records."""
    starts = [
        record
        for arm in runs.arms
        for seed in runs.seeds_of(arm)
        for record in read_records(runs.config(arm, seed).run_dir / "metrics.jsonl")
        if record.get("event") == "start"
    ]
    lines = [("tokens of each update", _same_tokens(runs))]
    if starts:
        for name, values in (
            ("layout", {start["layout"] for start in starts}),
            ("precision", {runs.any_config(arm).precision for arm in runs.arms}),
            ("machine", {_describe(start["environment"]) for start in starts}),
        ):
            lines.append((name, "; ".join(sorted(values))))
    hashes = {
        result.corpus_hash
        for arm in runs.arms
        for seed in runs.seeds_of(arm)
        for result in runs.results(arm, seed)
    }
    lines.append(("data digest", ", ".join(sorted(hash_[:16] for hash_ in hashes)) or "none"))
    return lines


def _describe(environment: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items() if key != "host")


def _same_tokens(runs: RunSet) -> str:
    """Whether the arms saw the same tokens in each update, seed by seed, as their ledgers say."""
    seeds = sorted({seed for arm in runs.arms for seed in runs.seeds_of(arm)})
    compared = 0
    for seed in seeds:
        ledgers = {
            arm: runs.curve(arm, seed).digests for arm in runs.arms if seed in runs.configs[arm]
        }
        for arm, other in combinations(ledgers, 2):
            common = ledgers[arm].keys() & ledgers[other].keys()
            if any(ledgers[arm][step] != ledgers[other][step] for step in common):
                return f"DIFFERENT: {arm} and {other} with seed {seed}"
            compared += len(common)
    if not compared:
        return "not compared: no two runs have a seed and a recorded step in common"
    return f"the same in all arms of a seed ({compared} digests compared)"


def _claims_table(verdicts: Sequence[Verdict]) -> Table:
    rows = []
    for verdict in verdicts:
        state = f"{SYMBOLS[verdict.state]} {verdict.state}"
        rows.append(
            [
                verdict.claim.name,
                _relation(verdict),
                verdict.claim.paper,
                _sides(verdict),
                _difference(verdict),
                _amount(verdict, verdict.estimate.detectable) if verdict.estimate else "–",
                str(verdict.estimate.pairs if verdict.estimate else 0),
                f"{state}: {verdict.reason}" if verdict.reason else state,
            ]
        )
    heads = ["claim", "judged by", "the paper", "ours", "difference", "detectable", "pairs", ""]
    return Table(
        "The claims",
        heads,
        rows,
        "Differences are left − right in nats per token, or left/right − 1; 95% intervals "
        "over runs (paired by seed, or by turn for time and memory) and documents. Detectable: the "
        "smallest true difference that would be told from nothing with a probability of 80%. "
        "“Within” is an equivalence test. The paper's numbers are of another corpus, tokenizer and "
        "size.",
        "claims",
    )


def _relation(verdict: Verdict) -> str:
    relation, margin = verdict.claim.relation
    words = {"greater_than": "difference >", "less_than": "difference <", "within": "within ±"}
    unit = f"{margin:.1%}" if verdict.claim.is_ratio else f"{margin:g}"
    return f"{words[relation]} {unit}"


def _sides(verdict: Verdict) -> str:
    if verdict.left is None or verdict.right is None:
        return "–"
    measure = verdict.claim.left.measure
    if measure == "seconds":
        return f"{verdict.left * 1e6:.3g} against {verdict.right * 1e6:.3g} µs per token"
    if measure == "memory":
        return f"{verdict.left / 1e6:,.1f} against {verdict.right / 1e6:,.1f} MB"
    return (
        f"{verdict.left:.4f} against {verdict.right:.4f} nats "
        f"(perplexity {_exp(verdict.left)} against {_exp(verdict.right)})"
    )


def _difference(verdict: Verdict) -> str:
    if verdict.estimate is None:
        return "–"
    low, high = verdict.estimate.interval()
    mean = _amount(verdict, verdict.estimate.mean)
    if math.isinf(low):
        return mean
    return f"{mean} [{_amount(verdict, low)}, {_amount(verdict, high)}]"


def _amount(verdict: Verdict, value: float) -> str:
    if math.isinf(value):
        return "–"
    return f"{math.expm1(value):+.1%}" if verdict.claim.is_ratio else f"{value:+.4f}"


def _perplexity(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    low, high = estimate.interval()
    if not high < 700 or not math.isfinite(estimate.mean):
        return _exp(estimate.mean)
    return f"{_exp(estimate.mean)} ± {(math.exp(high) - math.exp(low)) / 2:.2g}"


def _exp(loss: float) -> str:
    if not loss < 700:
        return "∞"
    perplexity = math.exp(loss)
    return f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:.3g}"


def _gap(runs: RunSet, arm: str, length: int) -> str:
    for seed in runs.seeds_of(arm):
        result = runs.result(arm, seed, length)
        if result is not None and result.gap:
            return "gap"
    return ""


def _paper_table(study: Study) -> Table | None:
    if not study.paper_curves:
        return None
    lengths = sorted({length for curve in study.paper_curves for length in curve.perplexities})
    rows = [
        [
            curve.label,
            *(f"{curve.perplexities.get(length, '–')}" for length in lengths),
            curve.source,
        ]
        for curve in study.paper_curves
    ]
    return Table(
        "The paper's perplexities, for orientation",
        ["arm", *map(str, lengths), "source"],
        rows,
        "Another corpus and another tokenizer: not to be compared number by number.",
        "paper",
    )


def _equal_time_table(study: Study, measures: Measures) -> Table | None:
    """ALiBi's short arm against the baseline at its own length, three ways, and where they tie."""
    rows = []
    for arm in study.arms:
        if arm.time_of is None:
            continue
        full, short = study.full_twin(arm), arm.time_of
        ratio = measures.choice.time_ratios.get(f"{short}/{full.name}")
        halted_step = measures.halted_step(full.name, short)
        halted = [
            measures.curve(full.name, seed).halted_loss(full.length, halted_step)
            for seed in study.seeds
            if halted_step is not None
        ]
        ties = [measures.break_even(short, full, seed) for seed in study.seeds]
        times = [measures.time_to_loss(short, full, seed) for seed in study.seeds]
        rows.append(
            [
                f"{short} against {full.name}, at {full.length}",
                "–" if ratio is None else f"{ratio:.3f}",
                _perplexity(measures.mean_loss(short, full.length)),
                _perplexity(measures.mean_loss(full.name, full.length)),
                _mean_perplexity(halted) + (" (not halted)" if ratio and ratio >= 1 else ""),
                _perplexity(measures.mean_loss(arm.name, full.length)),
                ", ".join(_tie(tie) for tie in ties),
                ", ".join("–" if time is None else f"{time:.2f}" for time in times),
            ]
        )
    heads = [
        "arms", "time ratio", "short", "long, equal updates", "long, halted",
        "long, re-annealed", "break-even speed ratio by seed", "time to equal loss by seed",
    ]  # fmt: skip
    return Table(
        "At equal updates and at equal time",
        heads,
        rows,
        "Perplexities. Halted: the long arm's validation when it had taken as long as the short "
        "one in all, its schedule unfinished, as in the paper's Table 11. Re-annealed: trained "
        "anew, the schedule ending there. Break-even: how many times faster the short arm would "
        "have to be for the halted one to be as good; never = the long arm is not as good even at "
        "its end. Time to equal loss: the short arm's over the long one's, the mean over five "
        "losses at the long length (the paper: 11% faster).",
        "equal_time",
    )


def _tie(ratio: float | None) -> str:
    if ratio is None:
        return "never"
    return "–" if math.isnan(ratio) else f"{ratio:.2f}"


def _mean_perplexity(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return _exp(statistics.fmean(known)) if known else "–"


def _speed_table(study: Study, measures: Measures) -> Table | None:
    if study.speed is None:
        return None
    rows = []
    for arm in study.timed_arms:
        for backend in study.speed.backends:
            costs = [cost for cost in measures.costs(arm.name, backend) if cost is not None]
            if not costs:
                continue
            seconds = [cost.seconds_per_token for cost in costs]
            spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
            rows.append(
                [
                    arm.name,
                    f"{backend} ({study.speed.backends[backend]})",
                    f"{1 / statistics.median(seconds):,.0f}",
                    f"{spread:.0%}",
                    f"{statistics.median(cost.memory for cost in costs) / 1e6:,.0f}",
                ]
            )
    return Table(
        "Speed and memory of a training step",
        ["arm", "attention", "tokens/s", "spread", "peak memory (MB)"],
        rows,
        f"Median of {study.speed.rounds} short runs, in turns and one at a time (under Slurm "
        "perhaps on different nodes); spread is largest − smallest over the median. Memory is the "
        "largest rank's, on a CPU the whole process's.",
        "speed",
    )


def _tuning_table(measures: Measures) -> Table | None:
    rows = []
    for arm, tuned in measures.choice.tuned.items():
        losses = ", ".join(
            f"{rate}: {'diverged' if loss is None else f'{loss:.4f}'}"
            for rate, loss in tuned.losses.items()
        )
        edge = "yes: try beyond" if tuned.at_edge else "no"
        rows.append([arm, f"{tuned.rate:g}", losses, edge])
    return Table(
        "Learning rates",
        ["arm", "chosen", "validation loss by rate", "at the edge"],
        rows,
        "Each arm's own, by the proxy's validation loss at the trained length.",
        "learning_rates",
    )
