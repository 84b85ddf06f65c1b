# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sphinx: what `make docs` builds. Nothing is fetched, neither when it is built nor when it is read."""

from __future__ import annotations

from pathlib import Path

import yaml

_GALAXY = yaml.safe_load((Path(__file__).resolve().parents[3] / "galaxy.yml").read_text(encoding="utf-8"))

project = "agentlab.proxmox"
copyright = "the agentlab.proxmox contributors"
title = "agentlab.proxmox"
version = release = _GALAXY["version"]
html_title = f"agentlab.proxmox {release}"
html_short_title = title

extensions = ["myst_parser", "sphinx_antsibull_ext"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
# The headings can be linked to as on GitHub.
myst_heading_anchors = 4
html_theme = "sphinx_ansible_theme"
html_theme_options = {"documentation_home_url": "index.html", "vcs_pageview_mode": "edit", "topbar_links": {}}
html_show_sphinx = False
html_show_sourcelink = False
html_css_files = ["agentlab.css"]
html_static_path = ["_static"]
highlight_language = "text"
default_role = "any"
pygments_style = "ansible"
nitpicky = True
intersphinx_mapping: dict[str, tuple[str, None]] = {}
