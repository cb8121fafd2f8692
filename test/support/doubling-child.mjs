/**
 * Renders templates that double two texts 28 times each and compare them, with the built engine, in a process of its own: it
 * could be ended by them. Prints what became of each, and the most memory that the process took, in MB.
 */
const load = (file) => import(new URL(`../../dist/${file}`, import.meta.url).href);
const { EvaluationPool } = await load('engine/evaluation-pool.js');
const { Evaluations } = await load('engine/evaluation.js');
const { compileTemplate } = await load('engine/templates.js');
const { OutputMemory } = await load('engine/output-memory.js');
const { atOnce } = await load('engine/turns.js');
const { Metrics } = await load('metrics.js');

const WAYS = [
  '{% capture a %}{{ a }}{{ a }}{% endcapture %}{% capture b %}{{ b }}{{ b }}{% endcapture %}',
  '{% assign a = a | append: a %}{% assign b = b | prepend: b %}',
  '{% assign a = a | replace: "x", "xx" %}{% assign b = b | replace: "x", "xx" %}',
];
const pool = new EvaluationPool({
  threads: 1,
  budget_ms: 60_000,
  metrics: new Metrics(),
  onDefect: (error) => console.error(error),
});
const codes = [];
for (const way of WAYS) {
  for (const comparison of ['a == b', 'a < b', 'a contains b']) {
    const source = `{% assign a = "x" %}{% assign b = "x" %}${way.repeat(28)}{% if ${comparison} %}yes{% endif %}`;
    const template = atOnce(compileTemplate(source, { pointer: '', faults: [] }));
    const held = new OutputMemory(Infinity, 1).open();
    const evaluations = new Evaluations(pool, new AbortController().signal, held);
    const scope = { query: '', variables: {}, chat_history: [], evaluations, earlier: () => ({}) };
    codes.push(
      await template.render(scope).then(
        () => 'rendered',
        ({ code }) => code,
      ),
    );
  }
}
console.log(JSON.stringify({ codes, mostMb: Math.round(process.resourceUsage().maxRSS / 1024) }));
await pool.close();
