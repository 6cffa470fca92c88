"""Finds what is wrong with manifests, one by one and together: for `check`, and for the log of `run`. Pure.

`decode` has the rules by which `run` rejects objects. Here are the rules of the API server, and those by which `run`
cannot reject an object, because what is missing may come later. The consequences of a mistake are not named.
"""

from userspace_proxy.control.lint.findings import Diagnostic, Finding, as_findings
from userspace_proxy.control.lint.linter import Linter, lint
from userspace_proxy.control.lint.options import LintOptions
