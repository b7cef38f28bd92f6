"""Makes the dashboards that the packages install.

    make dashboards

What comes out is committed, so that a build needs no tool for it; a test holds it in step.
"""

import sys
from pathlib import Path

import fleet
import gpu
import model
import overview
import security
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

SHEETS = (overview, model, gpu, fleet, security)


def content(made: Dashboard) -> str:
    """A dashboard as Grafana reads it.

    Its panels are numbered, as links to a panel name it by number. Its variables are without what the SDK gives to all,
    and Grafana has in those for intervals only.
    """
    for variable in made.templating.list_val or []:
        variable.auto = variable.auto_min = variable.auto_count = None
    for number, panel in enumerate(made.panels or [], start=1):
        panel.id_val = number
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(made) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards"
    folder.mkdir(exist_ok=True)
    for sheet in SHEETS:
        (folder / f"{sheet.__name__}.json").write_text(content(sheet.build().build()), encoding="utf-8")
