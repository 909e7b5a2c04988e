"""From contents to Megatron's legacy files. [CONV-37]"""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.convert.contents import Contents
from elastickpt.convert.options import Options
from elastickpt.convert.saved_forms import Form
from elastickpt.errors import Unsupported
from elastickpt.language import tree as t


def megatron_form(contents: Contents, program: t.Program, known: Mapping[str, object], options: Options) -> Form:
    raise Unsupported("megatron is not written yet")
