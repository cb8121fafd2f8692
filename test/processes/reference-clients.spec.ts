import { spawnSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { runProgram } from '../support/sse.js';

/** What a client of the documented system collects. */
interface Collected {
  chunks: { type: string; status?: string; data?: string; error?: string }[];
  /** Lines of data that were no JSON by themselves. */
  broken: string[];
}

type Client = (url: string, request: object) => Promise<Collected>;

/** Reads as the documented Python client does: lines of text, as requests decodes and splits them. */
const PYTHON_CLIENT = `
import json, sys, requests

url, request = sys.argv[1], json.loads(sys.argv[2])
chunks, broken = [], []
answer = requests.post(url + "/api/workflows/execute/stream", json=request, stream=True)
for line in answer.iter_lines(decode_unicode=True):
    if not line.startswith("data: "):
        continue
    try:
        chunk = json.loads(line[6:])
    except json.JSONDecodeError:
        broken.append(line)
        continue
    chunks.append(chunk)
    if chunk.get("status") in ("completed", "error"):
        break
json.dump({"chunks": chunks, "broken": broken}, sys.stdout)
`;

const python = ['python3', '/usr/bin/python3'].find(
  (candidate) => spawnSync(candidate, ['-c', 'import requests']).status === 0,
);

async function runPython(url: string, request: object): Promise<Collected> {
  if (!python) throw new Error('The Python package requests is not installed (python3-requests).');
  const { code, stdout, stderr } = await runProgram([
    python,
    '-c',
    PYTHON_CLIENT,
    url,
    JSON.stringify(request),
  ]);
  if (code !== 0) throw new Error(stderr);
  return JSON.parse(stdout) as Collected;
}

/** Reads as the documented JavaScript client does: each piece of the body is decoded and split by itself. */
async function runJavaScript(url: string, request: object): Promise<Collected> {
  const answer = await fetch(`${url}/api/workflows/execute/stream`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(request),
  });
  const collected: Collected = { chunks: [], broken: [] };
  const reader = answer.body?.getReader();
  const decoder = new TextDecoder();
  for (;;) {
    const { done = true, value } = (await reader?.read()) ?? {};
    if (done) return collected;
    for (const line of decoder.decode(value).split('\n')) {
      if (!line.startsWith('data: ')) continue;
      try {
        const chunk = JSON.parse(line.slice('data: '.length)) as Collected['chunks'][number];
        collected.chunks.push(chunk);
        if (chunk.status === 'completed' || chunk.status === 'error') return collected;
      } catch {
        collected.broken.push(line);
      }
    }
  }
}

const CLIENTS: { language: string; run: Client; missing?: string }[] = [
  { language: 'Python', run: runPython, missing: python ? undefined : 'python3-requests' },
  { language: 'JavaScript', run: runJavaScript },
];

describe.each(CLIENTS)(
  'a client written for the documented system in $language',
  ({ language, run, missing }) => {
    let app: TestApp;
    beforeAll(async () => {
      app = await startTestApp({ SEED_EXAMPLE: 'true' });
    });
    afterAll(() => app.close());

    // What is missing fails in CI, where all of it is installed.
    const isSkipped = missing !== undefined && !process.env['CI'];
    if (isSkipped) console.warn(`The ${language} client is not tested, because ${missing} is not installed.`);
    const test = isSkipped ? it.skip : it;

    test.each([
      ['plain text', 'My last invoice is wrong. What can I do?'],
      // Three bytes of these are line ends in Latin-1, as which requests decodes text without a charset.
      ['text beyond ASCII', 'Grüße an Åse … 日本語 🌍'],
      // Python's splitlines, which iter_lines uses, ends lines at each of them.
      [
        'line separators of Unicode',
        'next\u0085line\u2028paragraph\u2029vertical\u000bform\u000cfile\u001c end',
      ],
    ])('gets all of it and ends: %s', async (_name, query) => {
      const chat_history = [
        { actor: 'user', content: 'Hello' },
        { actor: 'assistant', content: 'Hi! How can I help you?' },
      ];
      const { chunks, broken } = await run(app.url, { deployment_name: 'support-desk', query, chat_history });

      expect(broken).toEqual([]);
      expect(chunks[0]).toMatchObject({ type: 'status', status: 'started', deployment_name: 'support-desk' });
      expect(chunks.at(-1)).toMatchObject({ type: 'status', status: 'completed' });
      const text = chunks.map(({ type, data }) => (type === 'content' ? data : '')).join('');
      const [execution] = await listExecutions(app);
      expect(text).toBe(execution?.response);
      expect(text).toContain(query);
    });

    test('ends at an error', async () => {
      const runtime_overrides = { timeout: 0.001 };
      const { chunks } = await run(app.url, {
        deployment_name: 'support-desk',
        query: 'Hello',
        runtime_overrides,
      });

      expect(chunks[0]).toMatchObject({ type: 'status', status: 'started' });
      expect(chunks.at(-1)).toMatchObject({ type: 'status', status: 'error', error: expect.any(String) });
    });
  },
);

async function listExecutions({ url }: TestApp): Promise<{ response: string }[]> {
  const answer = await fetch(`${url}/api/executions`);
  return ((await answer.json()) as { items: { response: string }[] }).items;
}
