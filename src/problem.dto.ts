import { STATUS_CODES } from 'node:http';
import { applyDecorators } from '@nestjs/common';
import { ApiExtraModels, ApiProperty, ApiResponse, getSchemaPath } from '@nestjs/swagger';
import { ERROR_CODES } from './errors.js';
import type { ErrorCode } from './errors.js';

/** One fault of a request. */
export class FaultDto {
  /** Where the fault is: a JSON pointer (RFC 6901) into the body, or into the parameters of the query. */
  @ApiProperty({ example: '/configuration/agents/0/agent_type' })
  pointer: string;

  /** What is wrong there. */
  @ApiProperty({ example: 'must be one of llm, template' })
  detail: string;
}

/** The body of every error answer (RFC 9457). */
export class ProblemDto {
  /** A URI reference that names the kind of the problem. */
  type: string;

  /** The kind of the problem in words. */
  title: string;

  /** The HTTP status code. */
  @ApiProperty({ type: 'integer' })
  status: number;

  /** What went wrong here, and what to do about it. */
  detail: string;

  /** The path of the request. */
  instance: string;

  /** A stable name of the problem, for programs. */
  @ApiProperty({ enum: Object.keys(ERROR_CODES) })
  code: ErrorCode;

  /** Finds the request in the server's log. */
  request_id: string;

  /** Every fault of the request, where there can be several. */
  @ApiProperty({ type: [FaultDto], required: false })
  errors?: FaultDto[];
}

/** Documents the problems that a route answers with, by code (`'workflow_not_found'`) or by bare HTTP status (`404`). */
export function ApiProblems(...problems: (ErrorCode | number)[]): MethodDecorator & ClassDecorator {
  const descriptions = new Map<number, string[]>();
  for (const problem of problems) {
    const status = typeof problem === 'number' ? problem : ERROR_CODES[problem].status;
    const description =
      typeof problem === 'number'
        ? (STATUS_CODES[problem] ?? String(problem))
        : `\`${problem}\`: ${ERROR_CODES[problem].title}`;
    descriptions.set(status, [...(descriptions.get(status) ?? []), description]);
  }
  const content = { 'application/problem+json': { schema: { $ref: getSchemaPath(ProblemDto) } } };
  return applyDecorators(
    ApiExtraModels(ProblemDto),
    ...[...descriptions].map(([status, lines]) =>
      ApiResponse({ status, description: lines.join('; '), content }),
    ),
  );
}
