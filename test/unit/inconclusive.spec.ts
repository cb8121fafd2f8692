import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, jest } from '@jest/globals';
import { expectByChance, inconclusive } from '../support/inconclusive.js';
import InconclusiveReporter, { readInconclusive } from '../support/inconclusive-reporter.mjs';
import { NOMINAL_MS, Yardstick } from '../support/yardstick.js';

let folder: string;
let told: string;
const logOfTheRun = process.env.INCONCLUSIVE_LOG;

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'inconclusive-'));
  process.env.INCONCLUSIVE_LOG = join(folder, 'log.jsonl');
  told = '';
  jest.spyOn(process.stderr, 'write').mockImplementation((text) => {
    told += String(text);
    return true;
  });
});
afterEach(async () => {
  jest.restoreAllMocks();
  if (logOfTheRun === undefined) delete process.env.INCONCLUSIVE_LOG;
  else process.env.INCONCLUSIVE_LOG = logOfTheRun;
  await rm(folder, { recursive: true });
});

const reasons = () => readInconclusive(process.env.INCONCLUSIVE_LOG).map(({ reason }) => reason);

describe('a test that showed nothing', () => {
  it('is named at once, and again with its file and reason at the end of the run', () => {
    const reporter = new InconclusiveReporter();
    reporter.onRunStart();
    inconclusive('no kill met a running step');
    expect(told).toContain('INCONCLUSIVE');
    told = '';
    reporter.onRunComplete();
    expect(told).toContain('Inconclusive: 1');
    expect(told).toMatch(/inconclusive\.spec\.ts › a test that showed nothing is named at once/);
    expect(told).toContain('no kill met a running step');
  });

  it('of an earlier run is not counted again, and without any the end of the run says nothing', () => {
    const reporter = new InconclusiveReporter();
    reporter.onRunStart();
    inconclusive('earlier');
    reporter.onRunStart();
    told = '';
    reporter.onRunComplete();
    expect(told).toBe('');
  });
});

it('a quota of chance is met by as many as it needs', () => {
  new InconclusiveReporter().onRunStart();
  expectByChance('hits', 5, 5);
  expect(reasons()).toEqual([]);
  expectByChance('hits', 4, 5);
  expect(reasons()).toEqual(['hits: 4, and at least 5 were needed']);
});

describe('a time', () => {
  const onMachines = (before: number, after: number) =>
    new Yardstick(async () => after * NOMINAL_MS, before * NOMINAL_MS);

  beforeEach(() => new InconclusiveReporter().onRunStart());

  it('within its limit is kept on any machine', async () => {
    await onMachines(9, 1).expectAtMost(100, 100, 'it');
    expect(reasons()).toEqual([]);
  });

  it('past its limit fails on a machine that is steady, by as much as that one is slower', async () => {
    await expect(onMachines(0.5, 0.5).expectAtMost(101, 100, 'it')).rejects.toThrow('it took 101 ms of 100');
    await onMachines(1, 2).expectAtMost(200, 100, 'it');
    await expect(onMachines(1, 2).expectAtMost(201, 100, 'it')).rejects.toThrow('2.0 times slower');
    expect(reasons()).toEqual([]);
  });

  it('past its limit is inconclusive on a machine that is too slow, or changed its pace', async () => {
    await onMachines(4, 4).expectAtMost(401, 100, 'it');
    await onMachines(0.5, 2).expectAtMost(201, 100, 'it');
    expect(reasons()).toHaveLength(2);
    await expect(onMachines(4, 4).expectAtMost(1201, 100, 'it')).rejects.toThrow('it took 1201 ms');
  });
});
