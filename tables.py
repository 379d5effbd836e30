"""Tables 1-5 and Figures 2-8 of the paper from the results of our runs, beside the published numbers.

    python tables.py runs/                                # all five tables; --table 3 for one of them
    python tables.py runs/ --table 3 --format markdown    # or latex
    python tables.py runs/ --table 3 --arch resnet20      # small-scale runs in the layout of the paper's ResNet-18
    python tables.py runs/ --claims --significance        # what of the paper's text holds; Welch's tests
    python tables.py runs/ --figures figures/             # PNG and PDF; --source paper draws the published numbers

Reads every results.json below the given folder (collect.py). The published numbers are those of paper/tables.json. The
exit code is 1 when a results.json was skipped because it is damaged or of an older form; each is named.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import runs
from claims import claim_rows, significance_rows
from collect import (
    KNOWN,
    Cell,
    Group,
    Key,
    choose,
    departures,
    group_runs,
    our_numbers,
    read_runs,
    reliability_bins,
    setting_of,
    summarise,
)

PAPER = Path(__file__).resolve().parent / "paper" / "tables.json"
NEVER_RUN = "—"
SEEDS = 3  # of the paper
CLAIMS = "What the text claims, from the paper's tables and from our runs (which may fall a point short of a gain)"
TESTS = "MAGNMA minus another method: Welch's test over seeds (p not corrected for the number of rows)"


# The paper's layout


def published(paper: dict, table: str) -> dict[str, dict[Key, Cell]]:
    """A table of paper/tables.json, row by row: row -> {key: cell}, in the paper's order of rows and columns."""
    rows = {}
    for row, cells in paper["tables"][table].items():
        dataset, arch, rest = row.split("/")
        if table == "5":  # the only one with the methods (MAGNMA's settings) as rows
            rows[row] = {(dataset, arch, rest, metric): Cell(*cell, 3) for metric, cell in cells.items()}
        else:
            rows[row] = {(dataset, arch, column, rest): Cell(*cell, 3) for column, cell in cells.items()}
    return rows


def bold_best(cells: list[Cell | None], better: Callable | None) -> list[str]:
    """Each cell as text, `**` around the best (ties, at two decimals, are all bold; a lone number is not)."""
    means = [round(cell.mean, 2) for cell in cells if cell is not None]
    best = better(means) if better and len(means) > 1 else None
    texts = []
    for cell in cells:
        text = NEVER_RUN if cell is None else f"{cell.mean:.2f}"
        if cell is not None and cell.deviation is not None:
            text += f"±{cell.deviation:.2f}"
        texts.append(f"**{text}**" if cell is not None and round(cell.mean, 2) == best else text)
    return texts


def table_rows(
    table: str, grid: dict[str, dict[Key, Cell]], ours: dict[Key, list[float]], names: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table: up to three lines a row, ours (with the number of seeds), the paper's, the difference.

    The best of a row is bold where the paper marks it: on the corrupted sets of Tables 1-4.
    """
    labels = {"1": ["Architecture", "Test set"], "2": ["Architecture", "Test set"], "5": ["Parameters"]}
    columns = [key[3] if table == "5" else key[2] for key in next(iter(grid.values()))]
    header = [*labels.get(table, ["Corruption"]), "", *(names[column] for column in columns)]
    rows = []
    for row in grid.values():
        dataset, arch, column, metric = next(iter(row))
        if table in "12":
            label = [names[arch], names[dataset] + ("" if metric.startswith("clean") else "-C")]
        else:
            label = [f"({', '.join(column.split()[1:])})" if table == "5" else names[metric]]
        better = None if table == "5" or metric.startswith("clean") else min if table == "1" else max
        cells = [summarise(ours[key]) if key in ours else None for key in row]
        texts = [text if cell is None else f"{text} ({cell.seeds})"
                 for text, cell in zip(bold_best(cells, better), cells, strict=True)]  # fmt: skip
        rows.append([*label, "ours", *texts])
        rows.append([*[""] * len(label), "paper", *bold_best(list(row.values()), better)])
        if any(cells):
            away = [NEVER_RUN if cell is None else f"{round(cell.mean - theirs.mean, 2) + 0.0:+.2f}"
                    for cell, theirs in zip(cells, row.values(), strict=True)]  # fmt: skip
            rows.append([*[""] * len(label), "difference", *away])
    return header, rows


def notes_on(groups: list[Group], names: dict[str, str], checkpoint: str) -> list[str]:
    """What must be known beside our numbers: stand-ins, data, departures from the paper's recipe, few seeds."""
    if not groups:
        return ["Ours: no run yet."]
    about: dict[tuple[int, str], list[Group]] = {}  # (order, what is said) -> of which runs
    for group in groups:
        shared, (dataset, arch, _) = group.shared, group.place
        network = f"{names[shared['dataset']]}, {names[shared['arch']]}"
        if shared["stands_for"]:
            text = f"STAND-IN DATA, NO RESULT: {network} stood in for the paper's, only to prove the machinery"
            about.setdefault((0, text), []).append(group)
        elif (shared["dataset"], shared["arch"]) != (dataset, arch):
            about.setdefault((1, f"Ours is {network}, the paper's {names[dataset]}, {names[arch]}"), []).append(group)
        text = f"Data: {names[shared['dataset']]}, {shared['data_source']}; {shared['corruption_source']} corruptions"
        about.setdefault((2, text), []).append(group)
        if away := departures(shared) + departures(shared, shared["method"]):
            about.setdefault((3, f"Not the paper's recipe: {', '.join(away)}"), []).append(group)
        if (seeds := sum(run[checkpoint] is not None for run in group.seeds.values())) < SEEDS:
            few = f"Fewer than {SEEDS} seeds ({seeds})" if seeds else f"{checkpoint}.pt not evaluated (--checkpoint)"
            about.setdefault((4, few), []).append(group)
    selected = {"best": "the epoch of best clean test accuracy, as the paper selects it", "last": "the last epoch"}
    notes = [f"Ours: mean ± sample deviation (seeds) of {checkpoint}.pt, {selected[checkpoint]}."]
    return notes + [f"{text}: {_whom(concerned, groups, names)}." for (_, text), concerned in sorted(about.items())]


def _whom(concerned: list[Group], groups: list[Group], names: dict[str, str]) -> str:
    """Of which of the table's runs a note speaks: every run, or those of a data set and network, or some columns."""
    if len(concerned) == len(groups):
        return "every run"
    parts = []
    for place in dict.fromkeys(group.place[:2] for group in concerned):
        columns = [group.place[2] for group in concerned if group.place[:2] == place]
        whole = len(columns) == sum(group.place[:2] == place for group in groups)
        where = f"{names[place[0]]} {names[place[1]]}"
        parts.append(where if whole else f"{where} {', '.join(names.get(column, column) for column in columns)}")
    return "; ".join(parts)


def footer_of(groups: list[Group], names: dict[str, str], checkpoint: str) -> str:
    """What must be known below a figure of our runs, in a line: checkpoint, data, departures from the recipe."""
    said = []
    for shared, seeds in ((group.shared, len(group.seeds)) for group in groups):
        said.append(f"{names[shared['dataset']]} ({shared['data_source']}), {shared['corruption_source']} corruptions")
        said.append(f"{seeds} seed{'' if seeds == 1 else 's'}")
        own = [f"{names.get(shared['method'], 'MAGNMA')} {text}" for text in departures(shared, shared["method"])]
        said += departures(shared) + own
    return f"Our runs, {checkpoint}.pt; {'; '.join(dict.fromkeys(said)) or 'none yet'}."


# Output


def render(style: str, title: str, header: list[str], rows: list[list[str]], notes: list[str], labels: int) -> str:
    """A table as text, markdown or latex; cells in `**` are bold, the first `labels` columns are left-aligned."""
    if style == "latex":
        return _latex(title, header, rows, notes, labels)
    if style == "markdown":
        lines = [["---"] * labels + ["---:"] * (len(header) - labels), *rows]
        body = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in [header, *lines]]
        return "\n".join([f"**{title}**", "", *body, "", *(f"- {note}" for note in notes), ""])
    notes = [*notes, "* best of the row"] if any(cell.startswith("**") for row in rows for cell in row) else notes
    rows = [[f"*{cell.replace('**', '')}" if cell.startswith("**") else cell for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        aligned = [row[i].ljust(widths[i]) if i < labels else row[i].rjust(widths[i]) for i in range(len(row))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([title, "", *lines, "", *notes, ""])


def _latex(title: str, header: list[str], rows: list[list[str]], notes: list[str], labels: int) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "—": "---", "<": "$<$", ">": "$>$", "~": r"\textasciitilde{}",
               "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip

    def escape(text: str) -> str:
        return "".join(special.get(c, c) for c in text)

    def cell(text: str) -> str:
        plain = escape(text.replace("**", ""))
        return rf"\textbf{{{plain}}}" if text.startswith("**") else plain

    lines = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    return "\n".join([
        r"\begin{table} % \usepackage{graphicx}", rf"\caption{{{escape(title)}}}", r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{'l' * labels}{'r' * (len(header) - labels)}}}", r"\hline",
        " & ".join(map(cell, header)) + r" \\", r"\hline", *lines, r"\hline", r"\end{tabular}}", "",
        *(rf"\par {escape(note)}" for note in notes), r"\end{table}", "",
    ])  # fmt: skip


def draw_figures(
    args: argparse.Namespace, theirs: dict[Key, Cell], ours: dict[Key, Cell], chosen: dict[tuple, Group],
    names: dict[str, str],
) -> list[Path]:  # fmt: skip
    """Draw the figures of `args.source` into `args.figures`; the paths. Raises ValueError without matplotlib."""
    try:
        import figures
    except ImportError as error:
        name = error.name or "matplotlib"
        raise ValueError(f"--figures needs the package {name}; install it: pip install {name}") from None
    picture = figures.load_picture(args.image, args.data)
    if args.source == "paper":
        return figures.draw_all(Path(args.figures), theirs, None, picture, names, "The paper's numbers.")
    really = names | {"cifar10": names[args.dataset], "resnet18": names[args.arch]}
    bins, footer = reliability_bins(chosen, args.checkpoint), footer_of(list(chosen.values()), names, args.checkpoint)
    return figures.draw_all(Path(args.figures), ours, bins, picture, really, footer)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag."""
    parser = runs.Parser(description="The paper's tables and figures from our runs, beside the published numbers.")
    add = parser.add_argument
    add("runs", nargs="?", default="runs", help="the folder below which every results.json is read")
    add("--table", choices=("1", "2", "3", "4", "5", "all"), help="which table; all, when nothing else is asked for")
    add("--format", choices=("text", "markdown", "latex"), default="text", help="of tables, claims and tests")
    add("--checkpoint", choices=("best", "last"), default="best", help="which evaluation of a run; the paper's is best")
    add("--dataset", choices=KNOWN["dataset"], default="cifar10", help="show its runs where the paper has CIFAR-10")
    add("--arch", choices=KNOWN["arch"], default="resnet18", help="show its runs where the paper has ResNet-18")
    add("--claims", action="store_true", help="recompute what the paper's text claims, from its tables and from ours")
    add("--significance", action="store_true", help="Welch's test of MAGNMA against AugMix and Standard, over seeds")
    add("--figures", metavar="DIR", help="draw Figures 2-8 and a reliability diagram as PNG and PDF")
    add("--source", choices=("runs", "paper"), default="runs", help="paper: the published numbers alone")
    add("--data", default="data", help="folder of the data sets, for the image of Figure 4")
    add("--image", choices=KNOWN["dataset"], default="digits", help="the data set of Figure 4's image")
    args = parser.parse_args(argv)
    if args.table is None and not (args.claims or args.significance or args.figures):
        args.table = "all"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    paper = runs.read_json(PAPER)
    names = paper["names"]
    grids = {table: published(paper, table) for table in paper["tables"]}
    cells = {table: {key: cell for row in grid.values() for key, cell in row.items()} for table, grid in grids.items()}
    theirs = cells["1"] | cells["2"] | cells["3"] | cells["4"]
    found, problems = ({}, []) if args.source == "paper" else read_runs(Path(args.runs))
    chosen, left_out = choose(group_runs(found, args.dataset, args.arch))
    values = our_numbers(chosen, args.checkpoint)

    def show(title: str, header: list[str], rows: list[list[str]], keys: Iterable[Key], labels: int) -> None:
        places = dict.fromkeys(key[:3] for key in keys)
        notes = notes_on([chosen[place] for place in places if place in chosen], names, args.checkpoint)
        notes += [line for place in places for line in left_out.get(place, [])]
        print(render(args.format, title, header, rows, notes, labels))

    for table in grids if args.table == "all" else args.table or ():
        header, rows = table_rows(table, grids[table], values, names)
        show(paper["titles"][table], header, rows, cells[table], header.index("") + 1)

    # stand-ins prove the tables' machinery; no claim is judged by them and no figure shows them
    homeless = [group for place, group in chosen.items() if place not in {key[:3] for key in theirs | cells["5"]}]
    chosen = {place: group for place, group in chosen.items() if not group.shared["stands_for"] and None not in place}
    values = {key: numbers for key, numbers in values.items() if key[:3] in chosen}
    settings = {place: setting_of(group.shared) for place, group in chosen.items()}
    ours = {key: summarise(numbers) for key, numbers in values.items()}
    if args.claims:
        alike = [not departures(g.shared) and g.shared["arch"] == g.place[1] for g in chosen.values()]
        header, rows = claim_rows(theirs, cells["5"], ours, settings, all(alike))
        show(CLAIMS, header, rows, theirs | cells["5"], len(header))
    if args.significance:
        header, rows = significance_rows(values, settings, names)
        show(TESTS, header, rows, values, 3)
    if args.figures:
        print("\n".join(map(str, draw_figures(args, theirs, ours, chosen, names))))

    for group in homeless:
        said = "{dataset}/{arch} {method}".format(**group.shared)
        hint = "--dataset and --arch put other data and networks there"
        print(f"tables.py: in no table: {said}, {len(group.seeds)} runs; {hint}", file=sys.stderr)
    for problem in problems:
        print(f"tables.py: skipped {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
