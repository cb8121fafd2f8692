import { describe, expect, it } from '@jest/globals';
import { ExecuteBatchDto } from '../../src/batches/batches.dto.js';
import { DeployWorkflowDto } from '../../src/deployments/deployments.dto.js';
import { AppError } from '../../src/errors.js';
import { ExecuteDto } from '../../src/executions/executions.dto.js';
import { checkJson, checkJsonText } from '../../src/json-body.js';
import { RequestPipe } from '../../src/request.pipe.js';
import { rounds } from '../support/effort.js';
import type { Type } from '@nestjs/common';

const pipe = new RequestPipe();
const check = (value: unknown, metatype: Type<object>) => pipe.transform(value, { type: 'body', metatype });
const times = <Item>(count: number, item: Item): Item[] => Array.from({ length: count }, () => item);

/** What the pipe throws. */
async function refusal(value: unknown, metatype: Type<object>): Promise<AppError> {
  try {
    await check(value, metatype);
  } catch (error) {
    if (error instanceof AppError) return error;
    throw error;
  }
  throw new Error('It was not refused.');
}

/** An object that fails the test that looks into it. */
const untouchable = new Proxy(
  {},
  {
    get: () => {
      throw new Error('somebody looked at it');
    },
    ownKeys: () => {
      throw new Error('somebody looked at it');
    },
  },
);

describe('a request', () => {
  it.each<[string, unknown, Type<object>, string]>([
    ['of a batch', { deployment_name: 'x', items: times(1001, untouchable) }, ExecuteBatchDto, '/items'],
    [
      'of a conversation',
      { deployment_name: 'x', query: 'x', chat_history: times(1001, untouchable) },
      ExecuteDto,
      '/chat_history',
    ],
    [
      'of a conversation in a batch',
      {
        deployment_name: 'x',
        items: [{ query: 'x' }, { query: 'x', chat_history: times(1001, untouchable) }],
      },
      ExecuteBatchDto,
      '/items/1/chat_history',
    ],
    [
      'inside of an object',
      { deployment_name: 'x', runtime_config: { allowed_overrides: times(1000, untouchable) } },
      DeployWorkflowDto,
      '/runtime_config/allowed_overrides',
    ],
    ['where a text belongs', { deployment_name: 'x', query: times(1001, untouchable) }, ExecuteDto, '/query'],
  ])(
    'is refused for a list that is too long, without a look at its elements: %s',
    async (_, body, type, at) => {
      const { code, faults } = await refusal(body, type);
      expect(code).toBe('validation_failed');
      expect(faults).toEqual([
        { pointer: at, detail: expect.stringMatching(/must contain no more than \d+ elements$/) },
      ]);
    },
  );

  it('has each of its faults told by its place, however deep', async () => {
    const { faults } = await refusal(
      {
        deployment_name: 7,
        items: [{ query: 'x', chat_history: [{ actor: 'robot', content: 'x' }, 'text'] }, { surprise: 1 }, 3],
      },
      ExecuteBatchDto,
    );
    expect([...new Set(faults?.map(({ pointer }) => pointer))].toSorted()).toEqual([
      '/deployment_name',
      '/items',
      '/items/0/chat_history',
      '/items/0/chat_history/0/actor',
      '/items/0/chat_history/1',
      '/items/1/query',
      '/items/1/surprise',
      '/items/2',
    ]);
  });

  it('is not answered with faults without end, nor with texts of any length', async () => {
    const items = times(1000, { ['x'.repeat(5000)]: 1 });
    const { message, faults = [] } = await refusal({ deployment_name: 'x', items }, ExecuteBatchDto);
    expect(faults).toHaveLength(100);
    expect(message).toMatch(/\(and \d+ more\)/);
    for (const { pointer, detail } of faults) {
      expect(pointer.length).toBeLessThanOrEqual(1001);
      expect(detail.length).toBeLessThanOrEqual(1001);
    }
  });

  it('keeps free-form JSON as it came, and does not copy it', async () => {
    const runtime_overrides = { variables: { toString: 1, deep: [{ a: [1] }] } };
    const checked = (await check(
      { deployment_name: 'x', query: 'x', runtime_overrides },
      ExecuteDto,
    )) as ExecuteDto;
    expect(checked).toBeInstanceOf(ExecuteDto);
    expect(checked.runtime_overrides).toBe(runtime_overrides);
    const variables = { a: 1 };
    const deploying = (await check(
      { deployment_name: 'x', runtime_config: { variables, timeout: 3 } },
      DeployWorkflowDto,
    )) as DeployWorkflowDto;
    expect(deploying.runtime_config).toEqual({ variables, timeout: 3 });
  });

  it('gives others their turn while its list is checked', async () => {
    const chat_history = times(1000, { actor: 'user', content: 'x' });
    const length = rounds(20, 12);
    const items = times(length, { query: 'x', chat_history });
    let turns = 0;
    let isOver = false;
    const count = () => {
      if (isOver) return;
      turns++;
      setImmediate(count);
    };
    setImmediate(count);
    const checked = (await check({ deployment_name: 'x', items }, ExecuteBatchDto)) as ExecuteBatchDto;
    isOver = true;
    expect(checked.items[length - 1]?.chat_history).toHaveLength(1000);
    expect(turns).toBeGreaterThan(5);
  });
});

describe('a JSON document', () => {
  const limits = { maxDepth: 32, maxValues: 1000 };
  const faultOf = (document: unknown) => {
    try {
      checkJson(document, limits);
    } catch (error) {
      if (error instanceof AppError) return error.faults?.[0];
      throw error;
    }
    return undefined;
  };

  it('is refused for its number of values, without a look at those of a list that is too long', () => {
    expect(faultOf({ a: times(1001, untouchable) })).toEqual({
      pointer: '/a',
      detail: 'has 1001 values, with which the document has more than 1000',
    });
    expect(faultOf(times(11, times(100, 1)))).toMatchObject({
      detail: expect.stringContaining('more than 1000'),
    });
    expect(faultOf(times(9, times(100, 1)))).toBeUndefined();
  });

  it.each([
    ['[]', 0],
    ['{ }', 0],
    ['3', 0],
    ['"a,b,[c"', 0],
    ['[\n1 , 2]', 2],
    ['[[],[[]]]', 3],
    ['{"a":[{}, {"b,{":"\\"[,\\\\"}], "ü": "💥,"}', 5],
    ['[1,,"', 3],
    ['"\\', 0],
  ])('has its values counted before it is parsed: %s', (text, values) => {
    const check = (maxValues: number) => () =>
      checkJsonText(Buffer.from(text).toString('latin1'), { maxValues });
    expect(check(values)).not.toThrow();
    if (values > 0) expect(check(values - 1)).toThrow(`has ${values} members and elements`);
  });
});
