import {
  Body,
  Controller,
  Delete,
  Get,
  HttpCode,
  Headers,
  Param,
  Post,
  Query,
  Res,
  Sse,
} from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import { ApiOkResponse, ApiParam, ApiTags } from '@nestjs/swagger';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { ApiProblems } from '../problem.dto.js';
import { ApiEventStream } from '../sse/api-event-stream.js';
import { DeploymentEventsQueryDto } from '../status-events/status-events.dto.js';
import { supportDesk, supportDeskId } from '../workflows/example.js';
import {
  DeploymentDetailsDto,
  DeploymentDto,
  DeploymentPageDto,
  DeployWorkflowDto,
  EnvironmentDto,
  ListDeploymentsDto,
  StatisticsDto,
  StatisticsQueryDto,
} from './deployments.dto.js';
import { DeploymentsService } from './deployments.service.js';
import { StatisticsService } from './statistics.service.js';

const DeploymentName = () => ApiParam({ name: 'deployment_name', example: supportDesk.name });

@ApiTags('deployments')
@Controller('api')
export class DeploymentsController {
  constructor(
    private readonly deployments: DeploymentsService,
    private readonly statisticsService: StatisticsService,
  ) {}

  /**
   * Deploy a workflow
   *
   * @remarks The deployment keeps the configuration that the workflow has now. A stopped deployment of the same name and environment becomes active again, with its counters, whichever workflow it had.
   */
  @Post('workflows/:workflow_id/deploy')
  @ApiParam({ name: 'workflow_id', format: 'uuid', example: supportDeskId })
  @ApiProblems(
    'validation_failed',
    'workflow_not_found',
    'workflow_inactive',
    'deployment_exists',
    'workflow_invalid',
  )
  async deploy(
    @Param('workflow_id') workflowId: string,
    @Body() body: DeployWorkflowDto,
    @Res({ passthrough: true }) response: Response,
  ): Promise<DeploymentDto> {
    const deployment = await this.deployments.deploy(workflowId, body);
    const { deployment_name, environment } = deployment;
    response.location(`/api/deployments/${deployment_name}?environment=${environment}`);
    return deployment;
  }

  /** List the active deployments, the one deployed last first */
  @Get('workflows/deployments/active')
  @ApiOkResponse({ type: [DeploymentDto] })
  listActive(): Promise<DeploymentDto[]> {
    return this.deployments.listActive();
  }

  /**
   * Stop a deployment
   *
   * @remarks It takes no new executions; running ones end, the record and the counters stay. Stopping it again changes nothing. Without an environment, an active deployment is meant before a stopped one.
   */
  @Post('workflows/deployments/:deployment_name/stop')
  @HttpCode(200)
  @DeploymentName()
  @ApiProblems('validation_failed', 'deployment_not_found')
  stop(
    @Param('deployment_name') deploymentName: string,
    @Query() { environment }: EnvironmentDto,
  ): Promise<DeploymentDto> {
    return this.deployments.stop(deploymentName, environment);
  }

  /**
   * Delete a deployment and its counters
   *
   * @remarks Running executions end, and the results of all of them can be read on.
   */
  @Delete('workflows/deployments/:deployment_name')
  @HttpCode(204)
  @DeploymentName()
  @ApiProblems('validation_failed', 'deployment_not_found')
  remove(
    @Param('deployment_name') deploymentName: string,
    @Query() { environment }: EnvironmentDto,
  ): Promise<void> {
    return this.deployments.remove(deploymentName, environment);
  }

  /** List deployments, active or not, newest names first */
  @Get('deployments')
  @ApiProblems('validation_failed')
  list(@Query() query: ListDeploymentsDto): Promise<DeploymentPageDto> {
    return this.deployments.list(query);
  }

  /** Read a deployment, active or not, with what it runs */
  @Get('deployments/:deployment_name')
  @DeploymentName()
  @ApiProblems('validation_failed', 'deployment_not_found')
  get(
    @Param('deployment_name') deploymentName: string,
    @Query() { environment }: EnvironmentDto,
  ): Promise<DeploymentDetailsDto> {
    return this.deployments.get(deploymentName, environment);
  }

  /**
   * Watch the status of a deployment and of its executions (Server-Sent Events)
   *
   * @remarks A snapshot of the deployment and its unfinished executions comes first, then every change of status once. It resumes without a gap, and never ends by itself: this page waits for an end, so read it with `curl -N` or an EventSource.
   */
  @Sse('deployments/:deployment_name/events', { maxPendingDataLength: 0 })
  @DeploymentName()
  @ApiEventStream('Server-Sent Events; the data of each one is a snapshot or a change of status')
  @ApiProblems('validation_failed', 'invalid_cursor', 'deployment_not_found', 'too_many_requests')
  events(
    @Param('deployment_name') deploymentName: string,
    @Query() query: DeploymentEventsQueryDto,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.deployments.watch(deploymentName, query, { lastEventId, response });
  }

  /**
   * Read how a deployment's executions went
   *
   * @remarks Only executions that have ended count, each at the time of its end. Percentiles are within 2 % of the exact ones. At most 1,500 steps of a time series can be asked for.
   */
  @Get('deployments/:deployment_name/statistics')
  @DeploymentName()
  @ApiProblems('validation_failed', 'deployment_not_found', 'too_many_requests')
  statistics(
    @Param('deployment_name') deploymentName: string,
    @Query() query: StatisticsQueryDto,
  ): Promise<StatisticsDto> {
    return this.statisticsService.statistics(deploymentName, query);
  }
}
