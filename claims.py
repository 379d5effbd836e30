"""What the paper's text claims, recomputed from its own tables and from our runs, and tests over our seeds.

`tables.py --claims` and `--significance` print these. A claim is a function of a look-up of numbers, so the published
ones and ours go through the same lines. Claims of Sec. 4, Sec. 7.4 and the captions of Figures 2, 3, 5 and 6.
"""

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from scipy import stats

from collect import Cell, Key
from data import CORRUPTIONS

NOISE, MIX, MAGNMA = "magnma 0.2 0 0.2 1", "magnma 0 5 0.2 1", "magnma 0.2 0.3 0.2 1"
BASELINES = ("standard", "at", "trades", "rse", "gn", "augmix")
ARCHS = ("resnet18", "densenet121", "inceptionv3")
SETS = ("cifar10", "cifar100")
SLACK = 1.0  # points that a repetition may fall short of a stated improvement: some three deviations of Table 3's mCA
METRICS = ("clean", "mca", *CORRUPTIONS, "clean_rmse", "corrupt_rmse")

Look = Callable[[str, str, str, str], Cell]  # raises KeyError for a number that is not there
Finding = tuple[str, bool | None]  # what the numbers say; does the claim hold (None: they cannot say)
Place = tuple[str, str, str]  # dataset, arch, column


# The kinds of claim


def improvement(
    look: Look, exact: bool, stated: float, dataset: str, metric: str, over: str, column: str, archs: tuple[str, ...]
) -> Finding:
    """A stated improvement of `column` over `over`, averaged over architectures; of an error, the reduction.

    `exact`: holds if it rounds to what is stated (the paper's own numbers); else if it falls short by SLACK at most.
    """
    sign = -1 if metric.endswith("rmse") else 1
    gains = []
    for arch in archs:
        with suppress(KeyError):
            gains.append(sign * (look(dataset, arch, column, metric).mean - look(dataset, arch, over, metric).mean))
    if not gains:
        raise KeyError(metric)
    gain = statistics.fmean(gains)
    said = f"{gain:.2f}"
    if len(gains) < len(archs):
        return f"{said} ({len(gains)} of {len(archs)} architectures)", None
    half_a_digit = 0.5 * 10.0 ** -len(str(stated).split(".")[1])
    short = abs(gain - stated) - half_a_digit if exact else stated - SLACK - gain
    return said, short < 1e-9


def present(look: Look, dataset: str, arch: str, columns: tuple[str, ...], metric: str) -> dict[str, float]:
    """The means of those columns that were run."""
    found = {}
    for column in columns:
        with suppress(KeyError):
            found[column] = look(dataset, arch, column, metric).mean
    return found


def majority(look: Look, exact: bool, dataset: str, rivals: tuple[str, ...]) -> Finding:
    """MAGNMA alone has the best accuracy (at two decimals) in more than half of the 18 corruptions.

    Where some rivals were not run it can fail already, but not hold.
    """
    first = tied = 0
    for name in CORRUPTIONS:
        own = round(look(dataset, "resnet18", MAGNMA, name).mean, 2)
        others = present(look, dataset, "resnet18", rivals, name)
        if not others:
            raise KeyError(name)
        best = round(max(others.values()), 2)
        first, tied = first + (own > best), tied + (own == best)
    said = f"first in {first} of 18, tied in {tied}"
    if len(others) < len(rivals):
        return f"{said} ({len(others)} of {len(rivals)} rivals)", None if first > 9 else False
    return said, first > 9


def leads(
    look: Look, exact: bool, places: list[tuple[str, str]], metric: str, rivals: tuple[str, ...], may_fail: int = 0
) -> Finding:
    """MAGNMA is the best (mCA: the highest, error: the lowest) at all of the (dataset, arch), but for `may_fail`.

    Where some were not run it can fail already, but not hold.
    """
    sign = -1 if metric.endswith("rmse") else 1
    leading, seen, compared = 0, 0, 0
    for dataset, arch in places:
        own = present(look, dataset, arch, (MAGNMA,), metric)
        others = present(look, dataset, arch, rivals, metric)
        if own and others:
            margin = min(sign * (own[MAGNMA] - other) for other in others.values())
            leading, seen, compared = leading + (margin > 0), seen + 1, compared + len(others)
    if not seen:
        raise KeyError(metric)
    said = f"by {margin:.2f} over the next" if len(places) == 1 else f"in {leading} of {seen}"
    if seen - leading > may_fail:
        return said, False
    if compared < len(places) * len(rivals):
        return f"{said} ({compared} of {len(places) * len(rivals)} comparisons)", None
    return said, True


def within_deviation(look: Look, exact: bool, dataset: str) -> Finding:
    """Where AugMix is ahead of MAGNMA, it is so by no more than the larger of the two deviations."""
    ahead, beyond = [], 0
    for name in CORRUPTIONS:
        own, other = look(dataset, "resnet18", MAGNMA, name), look(dataset, "resnet18", "augmix", name)
        if (lead := other.mean - own.mean) > 0:
            if own.deviation is None or other.deviation is None:
                return "needs two seeds", None
            ahead.append(lead)
            beyond += lead > max(own.deviation, other.deviation)
    return f"ahead in {len(ahead)}, beyond it in {beyond} ({max(ahead, default=0):.2f} at most)", beyond == 0


def clean_kept(look: Look, exact: bool, dataset: str) -> Finding:
    """MAGNMA's clean accuracy is not more than a point under Standard's; AT's and TRADES' are."""
    standard = look(dataset, "resnet18", "standard", "clean").mean
    own, at, trades = (look(dataset, "resnet18", c, "clean").mean - standard for c in (MAGNMA, "at", "trades"))
    return f"{own:+.2f}; AT {at:+.2f}, TRADES {trades:+.2f}", own >= -1 > max(at, trades)


def specialists(look: Look, exact: bool, dataset: str) -> Finding:
    """The noise-only ablation is ahead of mix-only on the noises, mix-only on the blurs and contrast (means)."""
    noises = [name for name in CORRUPTIONS if name.endswith("noise")]
    blurs = [name for name in CORRUPTIONS if name.endswith("blur")] + ["contrast"]
    lead = [statistics.fmean(look(dataset, "resnet18", one, name).mean - look(dataset, "resnet18", other, name).mean
                             for name in group)
            for one, other, group in ((NOISE, MIX, noises), (MIX, NOISE, blurs))]  # fmt: skip
    return f"by {lead[0]:.2f}; by {lead[1]:.2f}", min(lead) > 0


def insensitive(look: Look, exact: bool, settings: list[str], metric: str) -> Finding:
    """The metric spreads over no more than a point within each block of Table 5 (noise only, mix only, both)."""
    blocks: dict[tuple[bool, bool], list[float]] = {}
    for setting in settings:
        lambda1, lambda2 = (float(number) > 0 for number in setting.split()[1:3])
        blocks.setdefault((lambda1, lambda2), []).append(look("cifar10", "resnet18", setting, metric).mean)
    spreads = [max(values) - min(values) for values in blocks.values()]
    return "; ".join(f"{spread:.2f}" for spread in spreads), max(spreads) <= 1


# The claims


def claims() -> list[tuple[str, Callable[[Look, bool], Finding]]]:
    """(the claim, its function of a look-up and `exact`), about in the text's order; all but those on Table 5."""
    one, ablations = ("resnet18",), (*BASELINES, NOISE, MIX)
    stated = [
        ("Sec. 4: MAGNMA's mCA is 13.6 above Standard's (CIFAR-10)", 13.6, "cifar10", "mca", "standard", MAGNMA, one),
        ("Sec. 4: AugMix's is 11.9 above", 11.9, "cifar10", "mca", "standard", "augmix", one),
        ("Sec. 4: noise only is 9.3 above", 9.3, "cifar10", "mca", "standard", NOISE, one),
        ("Sec. 4: mix only is 11.8 above", 11.8, "cifar10", "mca", "standard", MIX, one),
        ("Sec. 4: MAGNMA's mCA is 16.7 above Standard's (CIFAR-100)", 16.7, "cifar100", "mca", "standard", MAGNMA, one),
        ("Sec. 7.4: the same, given as 13.6", 13.6, "cifar100", "mca", "standard", MAGNMA, one),
        ("Sec. 4: noise only is 10.8 above", 10.8, "cifar100", "mca", "standard", NOISE, one),
        ("Sec. 4: mix only is 14.0 above", 14.0, "cifar100", "mca", "standard", MIX, one),
        ("Sec. 4: average mCA improvement 13.0 (CIFAR-10)", 13.0, "cifar10", "mca", "standard", MAGNMA, ARCHS),
        ("Sec. 4: average mCA improvement 16.9 (CIFAR-100)", 16.9, "cifar100", "mca", "standard", MAGNMA, ARCHS),
        ("Sec. 4: average calibration gain over Standard 15.4 (CIFAR-10-C)", 15.4, "cifar10", "corrupt_rmse",
         "standard", MAGNMA, ARCHS),
        ("Sec. 4: the same, 16.2 (CIFAR-100-C)", 16.2, "cifar100", "corrupt_rmse", "standard", MAGNMA, ARCHS),
        ("Sec. 4: average calibration gain over AugMix 2.81 (CIFAR-10-C)", 2.81, "cifar10", "corrupt_rmse", "augmix",
         MAGNMA, ARCHS),
        ("Sec. 4: the same, 4.73 (CIFAR-100-C)", 4.73, "cifar100", "corrupt_rmse", "augmix", MAGNMA, ARCHS),
    ]  # fmt: skip
    names = ("stated", "dataset", "metric", "over", "column", "archs")
    rows = [(text, partial(improvement, **dict(zip(names, values, strict=True)))) for text, *values in stated]
    every = [(dataset, arch) for dataset in SETS for arch in ARCHS]
    for dataset, name in zip(SETS, ("CIFAR-10", "CIFAR-100"), strict=True):
        place = [(dataset, "resnet18")]
        rows += [
            (f"Fig. {5 if dataset == 'cifar10' else 6}: MAGNMA's mCA is above every baseline's ({name})",
             partial(leads, places=place, metric="mca", rivals=BASELINES)),
            (f"Sec. 4: both regularisers beat either alone, mCA ({name})",
             partial(leads, places=place, metric="mca", rivals=(NOISE, MIX))),
            (f"Sec. 4: best for the majority of corruptions, among all columns ({name}-C)",
             partial(majority, dataset=dataset, rivals=ablations)),
            (f"Sec. 4: the same, its own ablations left out ({name}-C)",
             partial(majority, dataset=dataset, rivals=BASELINES)),
            (f"Sec. 4: AugMix is ahead within the deviation only ({name}-C)",
             partial(within_deviation, dataset=dataset)),
            (f"Sec. 4: clean accuracy stays at Standard's, unlike AT's and TRADES' ({name})",
             partial(clean_kept, dataset=dataset)),
            (f"Sec. 4: noise only is better on noise, mix only on blur and contrast ({name}-C)",
             partial(specialists, dataset=dataset)),
        ]  # fmt: skip
    rivals = ("standard", "augmix")
    rows += [
        ("Fig. 2: largest mCA for nearly all architectures (one may fail)",
         partial(leads, places=every, metric="mca", rivals=rivals, may_fail=1)),
        ("Fig. 3: smallest calibration error for all architectures, corrupted sets",
         partial(leads, places=every, metric="corrupt_rmse", rivals=rivals)),
        ("Fig. 3: the same, clean sets", partial(leads, places=every, metric="clean_rmse", rivals=rivals)),
    ]  # fmt: skip
    return rows


def sensitivity_claims(settings: list[str]) -> list[tuple[str, Callable[[Look, bool], Finding]]]:
    """The claims of Sec. 7.4 on Table 5, whose rows are the columns `settings`."""
    metrics = {"clean": "clean accuracy", "mca": "mCA", "clean_rmse": "clean RMSE", "corrupt_rmse": "corrupt RMSE"}
    return [
        (f"Sec. 7.4: {name} spreads by a point at most in Table 5 (noise; mix; both)",
         partial(insensitive, settings=settings, metric=metric))
        for metric, name in metrics.items()
    ]  # fmt: skip


def judge(
    claim: Callable[[Look, bool], Finding], cells: dict[Key, Cell], exact: bool, settings: dict[Place, object]
) -> tuple[str, str]:
    """(what the numbers say, the verdict: holds | does not hold | cannot say).

    Numbers of one data set and architecture are only compared where `settings` says that they were trained alike.
    """
    used: set[Key] = set()

    def look(*key: str) -> Cell:
        cell = cells[key]
        used.add(key)
        return cell

    try:
        said, holds = claim(look, exact)
    except KeyError:
        return "not run", "cannot say"
    alike = {(key[:2], settings.get(key[:3])) for key in used}
    if len(alike) > len({key[:2] for key in used}):
        return f"{said} (not trained alike)", "cannot say"
    return said, {True: "holds", False: "does not hold", None: "cannot say"}[holds]


def claim_rows(
    paper: dict[Key, Cell],
    table5: dict[Key, Cell],
    ours: dict[Key, Cell],
    settings: dict[Place, object],
    papers_recipe: bool = True,
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of --claims: the claim, then what the paper's tables and what our runs say, with verdicts.

    The header says so where our runs are not of the paper's recipe: their verdicts are then none on the paper.

    `table5` is kept apart from `paper`, Tables 1-4: two of their numbers for the same runs differ by a rounding.
    """
    columns = list(dict.fromkeys(key[2] for key in table5))
    rows = [
        [text, *judge(claim, cells, True, {}), *judge(claim, ours, False, settings)]
        for cells, listed in ((paper, claims()), (table5, sensitivity_claims(columns)))
        for text, claim in listed
    ]
    verdict = "Verdict" if papers_recipe else "Verdict on them (not the paper's recipe)"
    return ["Claim", "From the paper's tables", "Verdict", "From our runs", verdict], rows


# Tests over seeds


def welch(a: list[float], b: list[float]) -> tuple[float, float, float, float] | None:
    """(difference of means a - b, ends of its 95% interval, two-sided p) by Welch's test; None without any spread.

    t = (mean a - mean b) / sqrt(s_a^2 / n_a + s_b^2 / n_b), with Welch and Satterthwaite's degrees of freedom.
    """
    if len(set(a)) == len(set(b)) == 1:
        return None
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.95)
    return statistics.fmean(a) - statistics.fmean(b), float(interval.low), float(interval.high), float(test.pvalue)


def significance_rows(
    ours: dict[Key, list[float]], settings: dict[Place, object], names: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of --significance: MAGNMA against AugMix and Standard, per row of Tables 1-4, over seeds."""
    rows = []
    for dataset, arch in sorted({key[:2] for key in ours if key[2] == MAGNMA}):
        for rival in ("augmix", "standard"):
            counts = [len(ours.get((dataset, arch, column, "mca"), [])) for column in (MAGNMA, rival)]
            about = [f"{names[dataset]}, {names[arch]}", names[rival]]
            if min(counts) < 2:
                few = f"cannot say: {counts[0]} and {counts[1]} seeds, 2 of each needed"
                rows.append([*about, "all", few, *[""] * 3])
            elif settings[dataset, arch, MAGNMA] != settings[dataset, arch, rival]:
                rows.append([*about, "all", "cannot say: not trained alike", *[""] * 3])
            else:
                for metric in METRICS:
                    a, b = (ours[dataset, arch, column, metric] for column in (MAGNMA, rival))
                    rows.append([*about, names[metric], *_test_row(a, b, metric)])
    return ["Data, network", "Against", "Row", "Difference", "95% interval", "p", "MAGNMA is"], rows


def _test_row(a: list[float], b: list[float], metric: str) -> list[str]:
    if (test := welch(a, b)) is None:
        return [f"{a[0] - b[0]:+.2f}", "no spread", "", ""]
    difference, low, high, p = test
    better = (difference < 0) == metric.endswith("rmse")
    verdict = "" if low <= 0 <= high else "better" if better else "worse"
    return [f"{difference:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{p:.4f}" if p >= 1e-4 else "<0.0001", verdict]
