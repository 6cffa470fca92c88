"""What is wrong with manifests, of each by itself and of one with another: for `check`, and for `run`'s log. Pure.

The rules that `run` refuses objects by are decode's. Here are those of the API server, and those that `run` cannot
refuse by, because what is missing may come later. What follows from a mistake that was named is not named again.
"""

from userspace_proxy.control.lint.linter import Finding, Linter, LintOptions, as_findings, lint
