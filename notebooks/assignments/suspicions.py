"""What a teacher should look at: found in the syntax trees of submissions, without running them.

Nothing here costs points. A forbidden name may stand in a comparison that a student made for
himself, and answers may be equal by chance; those of fewer than SHORT nodes are not compared.
"""

import ast
import builtins
import hashlib
import re

ANYWHERE = {  # how the tests, the solutions or isa.py can be reached
    "isa", "benchmarks", "importlib", "__import__", "exec", "eval", "compile", "open", "getattr",
    "globals", "vars", "locals", "inspect", "builtins", "__builtins__", "__dict__", "__globals__",
    "modules", "_getframe", "get_ipython", "runpy", "subprocess", "read_source", "read_text",
    "STAND_INS", "like", "learner", "loaded", "refined", "nn",
}
SHORT = 70  # nodes of a syntax tree: a right answer below can hardly be written in two ways
RIGHT = re.compile(r"right_\w+")  # the right functions of checks.py
AUTOGRAD = {"autograd", "backward", "grad", "jacobian", "vjp", "vmap", "func", "requires_grad_"}
IN_CELL = {  # what the text of one answer forbids
    "attend": {"scaled_dot_product_attention", "multi_head_attention_forward"},
    "pool-backward": AUTOGRAD,
    "log-sum-exp": {"logsumexp", "softmax", "log_softmax", "cross_entropy", "logaddexp"},
    "gcd": {"logsumexp", "log_softmax", "cross_entropy", "nll_loss"},
    "gcd-gradient": AUTOGRAD | {"cross_entropy", "log_softmax"},
    "lar": {"itm_loss", "local_alignment_regularization"},
}


def parsed(text):
    """The syntax tree of a cell without IPython's own lines, or an empty one."""
    lines = ["" if re.match(r"\s*[%!]", line) else line for line in text.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError):
        return ast.parse("")


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr)
                                                 and isinstance(n.value, ast.Constant))]
    return tree


def folded(node):
    """The text of a string that is put together from constants, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = folded(node.left), folded(node.right)
        return None if None in sides else "".join(sides)
    if isinstance(node, ast.JoinedStr):
        return "".join(folded(value) or "" for value in node.values)
    return None


def names_in(text):
    """Every name in a cell: variables, attributes, imports, and strings that could be names.

    torch.nn.functional is allowed, so its "nn" is left out.
    """
    found, nodes = set(), list(ast.walk(without_docstrings(parsed(text))))
    allowed = {id(n.value) for n in nodes if getattr(n, "attr", "") == "functional"}
    for node in nodes:
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.update({node.attr} if id(node) not in allowed else ())
        elif isinstance(node, ast.Import | ast.ImportFrom):
            start = getattr(node, "module", None) or ""
            for alias in node.names:
                path = f"{start}.{alias.name}".strip(".")
                found.update(path.replace("nn.functional", "functional").split("."))
        else:
            string = folded(node)
            if string and (re.fullmatch(r"[\w.]+", string) or "import" in string):
                found.update(re.findall(r"\w+", string))
    return found


def overwritten(text):
    """Built-ins that a cell replaces in the whole notebook, and attributes of modules it sets."""
    tree, names = parsed(text), set()
    local = {id(inner) for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ListComp | ast.GeneratorExp
                           | ast.SetComp | ast.DictComp | ast.ClassDef)
             for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in local:
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and id(node) not in local:
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Global):
            names.update(node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            chain = ast.unparse(node)
            if chain.split(".")[0] in ("torch", "F", "checks", "isa", "math", "builtins", "sys"):
                yield f"sets {chain}"
    yield from (f"overwrites {name}" for name in sorted(names & set(dir(builtins)))
                if not name.startswith("_"))


def look(written, solutions):
    """written: pairs (cell, text) of a submission; solutions: {cell: public text} -> sentences.

    A name that the public solution of the same cell uses is not forbidden there.
    """
    said = []
    for name, text in written:
        found = names_in(text) - names_in(solutions.get(name, ""))
        bad = found & (ANYWHERE | IN_CELL.get(name, set()))
        bad |= {word for word in found if RIGHT.fullmatch(word)}
        if bad:
            said.append(f"{name} uses {', '.join(sorted(bad))}")
        said += [f"{name} {what}" for what in overwritten(text)]
    return said + equal_to_public(shapes(written, {}), shapes(solutions.items(), {}))


def shape(text):
    """A digest of a cell's code without comments and names of variables; "" for a short one."""
    tree = without_docstrings(parsed(text))
    stored = {n.id for n in ast.walk(tree)
              if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    number = {}
    for node in ast.walk(tree):
        for field in ("id", "arg"):
            name = getattr(node, field, None)
            if name in stored:
                setattr(node, field, number.setdefault(name, f"v{len(number)}"))
    if sum(1 for _ in ast.walk(tree)) < SHORT:
        return ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def shapes(written, empty):
    """{cell: shape} of the longer answers; those equal to the stubs in `empty` are left out."""
    texts = {}
    for name, text in written:
        if not name.startswith("a cell "):
            texts[name] = f"{texts.get(name, '')}\n{text}"
    found = {name: shape(text) for name, text in texts.items()}
    return {name: s for name, s in found.items() if s and s != shape(empty.get(name, ""))}


def equal_cells(one, two):
    return [name for name in one if one[name] == two.get(name)]


def equal_to_public(mine, public):
    same = equal_cells(mine, public)
    if 2 * len(same) <= len(public):
        return []
    return [f"{len(same)} of {len(public)} longer answers are the public solution, but for names"]


def equal_submissions(results, public):
    """results: {submission: result of grade()} -> {submission: sentences about equal ones}.

    Two submissions are equal where they share at least three answers that are not the public
    solution's, and more than half of all such; or the answer in prose.
    """
    said = {name: [] for name in results}
    own = {name: {cell: s for cell, s in result.get("shapes", {}).items() if s != public.get(cell)}
           for name, result in results.items()}
    texts = {name: [answer["answer"] for answer in result.get("to_read", ()) if answer["answer"]]
             for name, result in results.items()}
    for one in results:
        alike, wrote = {}, []
        for two in results:
            if one == two:
                continue
            same = equal_cells(own[one], own[two])
            if len(same) >= 3 and 2 * len(same) > len(own[one]):
                alike.setdefault(len(same), []).append(two)
            if set(texts[one]) & set(texts[two]):
                wrote.append(two)
        said[one] += [f"{count} answers equal those of {some(others)}, but for names"
                      for count, others in alike.items()]
        said[one] += [f"the answer in prose equals that of {some(wrote)}"] * bool(wrote)
    return said


def some(names):
    """The first three, and how many more."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
