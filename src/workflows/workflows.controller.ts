import { Body, Controller, Delete, Get, HttpCode, Param, Post, Put, Query, Res } from '@nestjs/common';
import { ApiBody, ApiOkResponse, ApiParam, ApiTags } from '@nestjs/swagger';
import type { Response } from 'express';
import { ApiProblems } from '../problem.dto.js';
import { supportDesk, supportDeskId } from './example.js';
import { CreateWorkflowDto, ListWorkflowsDto, UpdateWorkflowDto, WorkflowDto } from './workflows.dto.js';
import { WorkflowsService } from './workflows.service.js';

const WorkflowId = () => ApiParam({ name: 'workflow_id', format: 'uuid', example: supportDeskId });

@ApiTags('workflows')
@Controller('api/workflows')
export class WorkflowsController {
  constructor(private readonly workflows: WorkflowsService) {}

  /** Create a workflow, or the next version of one */
  @Post()
  @ApiBody({ type: CreateWorkflowDto, examples: { 'support-desk': { value: supportDesk } } })
  @ApiProblems('validation_failed', 'workflow_exists', 'workflow_invalid')
  async create(
    @Body() body: CreateWorkflowDto,
    @Res({ passthrough: true }) response: Response,
  ): Promise<WorkflowDto> {
    const workflow = await this.workflows.create(body);
    response.location(`/api/workflows/${workflow.workflow_id}`);
    return workflow;
  }

  /** List workflows, newest first */
  @Get()
  @ApiOkResponse({ type: [WorkflowDto] })
  @ApiProblems('validation_failed')
  list(@Query() query: ListWorkflowsDto): Promise<WorkflowDto[]> {
    return this.workflows.list(query);
  }

  /** Read a workflow */
  @Get(':workflow_id')
  @WorkflowId()
  @ApiProblems('workflow_not_found')
  get(@Param('workflow_id') workflowId: string): Promise<WorkflowDto> {
    return this.workflows.get(workflowId);
  }

  /**
   * Change a workflow
   *
   * @remarks Fields that are given replace the old ones. Deployments keep the configuration that they were deployed with.
   */
  @Put(':workflow_id')
  @WorkflowId()
  @ApiBody({
    type: UpdateWorkflowDto,
    examples: { describe: { value: { description: 'Answers what customers ask.' } } },
  })
  @ApiProblems('validation_failed', 'workflow_not_found', 'workflow_exists', 'workflow_invalid')
  update(@Param('workflow_id') workflowId: string, @Body() body: UpdateWorkflowDto): Promise<WorkflowDto> {
    return this.workflows.update(workflowId, body);
  }

  /** Delete a workflow that has no active deployment */
  @Delete(':workflow_id')
  @HttpCode(204)
  @WorkflowId()
  @ApiProblems('workflow_not_found', 'workflow_in_use')
  remove(@Param('workflow_id') workflowId: string): Promise<void> {
    return this.workflows.remove(workflowId);
  }
}
