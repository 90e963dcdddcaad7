"""What the page of methods reads from the classes."""

import inspect
import re
import sys

from shared import table

from sidae_lib import methods


def linked(text: str) -> str:
    """Markdown whose papers are links, and in which a line never ends at an equals sign."""
    text = re.sub(r" = (?=\S)", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}", text)
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", text)


def symbols(text: str) -> str:
    """Markdown in which the letters of an equation look as they do there. a, A and I are words, but in "view A"."""
    letter = (r"(?<![\w'])(theta|xi|tau|phi|lambda|(?<=view )A|[b-zB-HJ-Z]|[aA](?=[_^]))"
              r"(?:([_^])(\w+|[+-])|([+-])|('))?(?![\w-]|\.\w)( = -?\d+(?:\.\d+)?)?")  # fmt: skip

    def shown(found: re.Match[str]) -> str:
        name, where, index, sign, prime, value = found.groups(default="")
        name = f"\\{name}" if len(name) > 1 else name
        return f"${name}{f'{where}{{{index}}}' if index else f'_{sign}' if sign else prime}{value}$"

    parts = text.split("`")
    return "`".join(part if k % 2 else re.sub(letter, shown, part) for k, part in enumerate(parts))


def axes() -> str:
    """The five choices of every method that has them by itself, as a table."""
    rows = []
    for name, a in methods.five_axes().items():
        _, *others = (choice.replace("_", "_<wbr>") for choice in vars(a).values())
        rows.append([f"[{methods.METHODS[name].look.name}](#method-{name})", f"`{a.augment}`", *others])
    shown = table(["method", *methods.Axes.__dataclass_fields__], rows)
    return f":::{{table}}\n:class: axes\n{shown}\n:::"


def entry(name: str) -> str:
    """A method: its heading, its class's words and equation, and where the class stands."""
    cls = methods.METHODS[name]
    words = linked(symbols(inspect.cleandoc(cls.__doc__ or ""))).replace("Deviations:", "**Deviations:**")
    first, *more = words.split("\n\n")
    equation = [f"$$\n\\begin{{aligned}}\n{cls.equation}\n\\end{{aligned}}\n$$"] if cls.equation else []
    file = cls.__module__.replace(".", "/")
    place = f'<a href="_modules/{file}.html#{cls.__qualname__}"><code>{cls.__qualname__}</code></a>'
    return "\n\n".join([f"(method-{name})=\n### {cls.look.name}", first, *equation, *more,
                        f"In commands: `{name}`. Code: {place} in `{file}.py`."])


def each_method() -> str:
    """All of them by file: the first sentence of the file's docstring is a heading."""
    files: dict[str, list[str]] = {}
    for name, cls in methods.METHODS.items():
        words = sys.modules[cls.__module__].__doc__ or cls.__module__.rpartition(".")[2]
        files.setdefault(words, []).append(name)
    parts = []
    for words, names in files.items():
        heading, _, more = inspect.cleandoc(words).partition(".")
        parts += [f"## {' '.join(heading.split())}", linked(more.strip()), *map(entry, names)]
    return "\n\n".join(parts)


def made(scale: str) -> dict[str, str]:
    return {"axes": axes(), "each_method": each_method()}
