"""The report's style sheet and page skeleton."""

from __future__ import annotations

__all__ = ["PAGE"]

_CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1b2130; --dim: #5c6577; --rule: #e1e5ec;
  --accent: #2f6fde; --warn: #c2560c; --good: #157f5b; --violet: #7a4fd0; --bad: #c02a37; --code: #eef1f6; }
@media (prefers-color-scheme: dark) { :root { --page: #12151c; --card: #1a1f29; --ink: #e6e9f0; --dim: #98a2b5;
  --rule: #2c3442; --accent: #6ea3ff; --warn: #f09a54; --good: #4cc79a; --violet: #b296ff; --bad: #ff7c86;
  --code: #232a37; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0 0 8px; color: var(--dim); font-weight: 600; }
p { margin: 0 0 8px; }
.dim { color: var(--dim); }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 13px; font-weight: 600;
  vertical-align: 4px; margin-left: 8px; border: 1px solid currentColor; }
.complete, .done { color: var(--good); } .failed { color: var(--bad); }
.incomplete, .running, .waiting { color: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.tile b { display: block; font-size: 21px; white-space: nowrap; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 13px; color: var(--dim); }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 12px; }
.gap { margin-top: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--dim); }
svg .label { fill: var(--ink); } svg .mark-label { font-weight: 600; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--dim); }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .faint { stroke-width: 1; opacity: .35; }
svg .target { opacity: 0; } svg .target:hover { opacity: .9; } svg .dot:hover { stroke: var(--ink); }
svg .bar { fill: var(--accent); opacity: .85; } svg .bar:hover { opacity: 1; }
svg .mark { stroke-width: 1.5; stroke-dasharray: 4 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.name { white-space: nowrap; }
.chosen td { font-weight: 600; color: var(--good); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--code); border-radius: 8px; padding: 10px 12px; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.sample { margin-bottom: 12px; } .sample > p { font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
.none { color: var(--dim); font-style: italic; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--dim); overflow-wrap: anywhere; }
.hash { font-size: 11px; color: var(--dim); word-break: break-all; min-width: 180px; }
.alert { border-left: 4px solid var(--bad); margin-top: 16px; } .alert.soft { border-left-color: var(--warn); }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<title>{{ facts.run.name }} - sparktune report</title>
<style>""" + _CSS + """</style>
</head>
<body>
<main>
<h1>{{ facts.run.name }}<span id="status" class="badge {{ facts.status }}">{{ facts.status }}</span></h1>
<p class="dim">
{% if facts.plan %}{{ facts.plan.mode }} of {{ facts.plan.model }}{% if facts.plan.data %} on {{ facts.plan.data }}
{% endif %} &middot; {% endif %}written {{ written }}
</p>
{% if facts.failed_stage %}
<div class="card alert" id="failure">
<p><b>The stage {{ facts.failed_stage.name }} failed.</b></p>
{% for text in facts.failed_stage.errors %}<p>{{ text }}</p>{% endfor %}
<p class="dim">The log is {{ facts.run.log }}. What was finished before is below.</p>
</div>
{% endif %}
{% if facts.missing or facts.warnings %}
<div class="card alert soft" id="notes">
{% for text in facts.warnings %}<p>{{ text }}</p>{% endfor %}
{% if facts.missing %}<p class="dim">Not in this report: {{ facts.missing | join("; ") }}.</p>{% endif %}
</div>
{% endif %}
<div class="tiles" id="tiles">
{% for name, figure, note in tiles %}
<div class="card tile"><span>{{ name }}</span><b>{{ figure }}</b><span>{{ note }}</span></div>
{% endfor %}
</div>

{% if facts.samples %}
{% macro answer_text(text) %}
{% if text.strip() %}<pre>{{ text }}</pre>{% else %}<span class="none">an empty answer</span>{% endif %}
{% endmacro %}
<section id="samples">
<h2>Before and after</h2>
{% for sample in facts.samples %}
<div class="card sample">
<p>{{ sample.prompt }}</p>
<div class="grid2">
<div><h3>Before{% if sample.before %}: {{ sample.before[0] }}{% endif %}</h3>
{% if sample.before %}{{ answer_text(sample.before[1]) }}{% else %}<span class="none">not asked</span>{% endif %}</div>
<div><h3>After{% if sample.after %}: {{ sample.after[0] }}{% endif %}</h3>
{% if sample.after %}{{ answer_text(sample.after[1]) }}{% else %}<span class="none">not asked</span>{% endif %}
{% for who, answer in sample.others %}
{% if answer == sample.after[1] %}<p class="dim gap">{{ who }}: the same answer</p>
{% else %}<h3 class="gap">{{ who }}</h3>{{ answer_text(answer) }}{% endif %}
{% endfor %}
</div>
</div>
{% if sample.between %}
<details><summary>{{ sample.between | length }} answer{{ "s" if sample.between | length > 1 }} during training</summary>
{% for when, answer in sample.between %}<h3 class="gap">{{ when }}</h3>{{ answer_text(answer) }}{% endfor %}
</details>
{% endif %}
</div>
{% endfor %}
</section>
{% endif %}

{% if charts %}
<section id="training">
<h2>Training</h2>
<div class="grid2">
{% for name, svg in charts %}
<div class="card chart"><h3>{{ name }}</h3>{{ svg }}</div>
{% endfor %}
</div>
</section>
{% endif %}

{% if facts.data %}
<section id="data">
<h2>Data</h2>
<div class="grid2">
<div class="card chart"><h3>Lengths</h3>{{ lengths }}
{% if far_cut %}<p class="dim">The cut at {{ facts.plan.max_seq_length | count }} tokens is far beyond the longest
example.</p>{% endif %}
</div>
<div class="card">
<h3>Rows</h3>
<table>
<tr><td>Rows in the file</td><td class="num">{{ facts.data.rows | count }}</td></tr>
<tr><td>Training examples</td><td class="num">{{ facts.data.train_examples | count }}</td></tr>
<tr><td>Held out</td><td class="num">{{ facts.data.eval_examples | count }}</td></tr>
<tr><td>Tokens to train on</td><td class="num">{{ facts.data.lengths.total | count }}</td></tr>
<tr><td>of which supervised</td><td class="num">{{ "%.0f %%" | format(100 * facts.data.supervised_share) }}</td></tr>
<tr><td>Mean, median, longest</td><td class="num">{{ "%.0f" | format(facts.data.lengths.mean) }},
{{ facts.data.lengths.p50 | count }}, {{ facts.data.lengths.max | count }}</td></tr>
<tr><td>Several turns</td><td class="num">{{ facts.data.multi_turn | count }}</td></tr>
<tr><td>With a system prompt</td><td class="num">{{ facts.data.with_system | count }}</td></tr>
<tr><td>With thinking</td><td class="num">{{ facts.data.with_thinking | count }}</td></tr>
<tr><td>Exact repeats</td><td class="num">{{ facts.data.duplicates | count }}</td></tr>
<tr><td>Near repeats</td><td class="num">{{ facts.data.near_duplicates | count }}</td></tr>
<tr><td>Held-out rows also in training</td><td class="num">{{ facts.data.eval_leaks | count }}</td></tr>
<tr><td>Held-out rows nearly in training</td><td class="num">{{ facts.data.near_leaks | count }}</td></tr>
{% for code, found in facts.data.findings.items() if code.startswith("pii_") or code in ("markup", "left_out") %}
<tr><td>Rows with {{ code | replace("pii_", "personal data: ") | replace("_", " ") }}</td>
<td class="num">{{ found.rows | count }}</td></tr>
{% endfor %}
{% if facts.data.split %}<tr><td>Version of the split</td><td class="hash">{{ facts.data.split }}</td></tr>{% endif %}
{% if facts.data.cleaned %}
<tr><td>Cleaned copy that was trained on</td><td class="hash">{{ facts.data.cleaned.path }}<br>
{{ facts.data.cleaned.sha256 }}</td></tr>
{% for code, found in facts.data.cleaned.removed.items() %}
<tr><td>Rows left out: {{ code | replace("_", " ") }}</td><td class="num">{{ found.rows | count }}</td></tr>
{% endfor %}
{% for code, found in facts.data.cleaned.redacted.items() %}
<tr><td>Places replaced: {{ code }}</td><td class="num">{{ found.count | count }}</td></tr>
{% endfor %}
{% endif %}
</table>
</div>
{% if packing %}
<div class="card" id="packing">
<h3>Packing: share of real tokens in padded micro-batches</h3>
<table>
<tr><th>Pack length</th><th class="num">Real tokens</th></tr>
{% for length, share, chosen in packing %}
<tr{% if chosen %} class="chosen"{% endif %}><td>{{ length | count }}{% if chosen %} (this run){% endif %}</td>
<td class="num">{{ "%.1f %%" | format(100 * share) }}</td></tr>
{% endfor %}
</table>
</div>
{% endif %}
<div class="card" id="drops">
<h3>Left out</h3>
{% if facts.data.dropped %}
<table>
<tr><th>Reason</th><th class="num">Rows</th></tr>
{% for code, rows in facts.data.dropped.items() %}
<tr><td>{{ code }}</td><td class="num">{{ rows | count }}</td></tr>
{% endfor %}
</table>
{% if facts.data.problems %}
<details><summary>The first rows and why</summary>
<table>
{% for problem in facts.data.problems %}
<tr><td class="num">{{ problem.line }}</td><td>{{ problem.code }}</td><td>{{ problem.text }}</td></tr>
{% endfor %}
</table>
</details>
{% endif %}
{% else %}
<p class="dim">Nothing: every row trains or evaluates.</p>
{% endif %}
{% for text in facts.data.warnings %}<p>{{ text }}</p>{% endfor %}
</div>
</div>
</section>
{% endif %}

{% if facts.checks %}
<section id="evaluation">
<h2>Evaluation</h2>
<div class="card scroll">
<table>
{% for row in facts.checks %}
<tr><td>{% for key, value in row.items() %}<span class="dim">{{ key }}</span> {{ value | short }}
{% if not loop.last %}&middot; {% endif %}{% endfor %}</td></tr>
{% endfor %}
</table>
</div>
</section>
{% endif %}

{% if facts.stages %}
<section id="stages">
<h2>Stages</h2>
<div class="card">
<table>
<tr><th>Stage</th><th>Outcome</th><th class="num">Time</th></tr>
{% for stage in facts.stages %}
<tr><td>{{ titles.get(stage.name, stage.name) }}</td><td class="{{ stage.status }}">{{ stage.status }}</td>
<td class="num">{{ stage.seconds | duration }}</td></tr>
{% endfor %}
</table>
</div>
</section>
{% endif %}

{% if folders %}
<section id="artifacts">
<h2>Files</h2>
<div class="card">
{% for folder, bytes, files in folders %}
<details{% if files | length <= 4 %} open{% endif %}><summary><b>{{ folder.name }}</b> &middot; {{ bytes | size }},
{{ files | length }} file{{ "s" if files | length > 1 }} &middot; {{ folder }}</summary>
<div class="scroll">
<table>
{% for name, size, sha256 in files %}
<tr><td>{{ name }}</td><td class="num">{{ size | size }}</td><td class="hash">{{ sha256 }}</td></tr>
{% endfor %}
</table>
</div>
</details>
{% endfor %}
</div>
</section>
{% endif %}

{% if replay %}
<section id="replay">
<h2>The same run again</h2>
<pre>{{ replay }}</pre>
</section>
{% endif %}

{% if choices %}
<section id="choices">
<h2>Choices and reasons</h2>
<div class="card scroll">
<table>
<tr><th>What</th><th>Chosen</th><th>Why</th></tr>
{% for what, chosen, reason in choices %}
<tr><td class="name">{{ what }}</td><td>{{ chosen }}</td><td class="dim">{{ reason }}</td></tr>
{% endfor %}
</table>
</div>
</section>
{% endif %}

<section id="versions">
<h2>Versions</h2>
<div class="card">
<table>
{% for name, version in facts.versions.items() %}
<tr><td>{{ name }}</td><td>{{ version }}</td></tr>
{% endfor %}
</table>
</div>
</section>
</main>
</body>
</html>
"""
