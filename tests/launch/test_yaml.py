"""jobset.yaml and skypilot.yaml, against what their definitions ask for."""

import pathlib
import re
import subprocess

import pytest
import yaml

from tests import test_docs
from vssl_jax.utils import distributed

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / 'launch'
JOBSETS = list(yaml.safe_load_all((LAUNCH / 'jobset.yaml').read_text()))
SKY = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())

# The fields that we use of jobset.x-k8s.io/v1alpha2 (its CustomResource
# Definition of August 2026, with the Job and Pod inside it). A star must be
# there; a list has items of one kind; a set lists the values allowed.
NAMED = {'name*': str}
JOBSET = {
  'apiVersion*': {'jobset.x-k8s.io/v1alpha2'},
  'kind*': {'JobSet'},
  'metadata*': {'name*': str, 'labels': dict, 'annotations': dict},
  'spec*': {
    'failurePolicy': {
      'maxRestarts': int,
      'rules': [
        {
          'name*': str,
          'action*': {
            'FailJobSet',
            'RestartJobSet',
            'RestartJobSetAndIgnoreMaxRestarts',
            'RestartJob',
            'RestartJobAndIgnoreMaxRestarts',
          },
          'onJobFailureReasons': [{'PodFailurePolicy', 'BackoffLimitExceeded'}],
        }
      ],
    },
    'replicatedJobs*': [
      {
        'name*': str,
        'replicas': int,
        'template*': {
          'spec*': {
            'parallelism': int,
            'completions': int,
            'completionMode': {'Indexed'},
            'backoffLimit': int,
            'podFailurePolicy': {
              'rules*': [
                {
                  'action*': {'FailJob', 'FailIndex', 'Ignore', 'Count'},
                  'onExitCodes': {
                    'containerName': str,
                    'operator*': {'In', 'NotIn'},
                    'values*': [int],
                  },
                  'onPodConditions': [
                    {'type*': {'DisruptionTarget'}, 'status': {'True'}}
                  ],
                }
              ]
            },
            'template*': {
              'spec*': {
                'restartPolicy': {'Never'},
                'terminationGracePeriodSeconds': int,
                'hostNetwork': bool,
                'dnsPolicy': {'ClusterFirstWithHostNet'},
                'nodeSelector': dict,
                'containers*': [
                  {
                    'name*': str,
                    'image': str,
                    'terminationMessagePolicy': {'FallbackToLogsOnError'},
                    'workingDir': str,
                    'securityContext': {'privileged': bool},
                    'command': [str],
                    'env': [NAMED | {'value': str, 'valueFrom': dict}],
                    'resources': {'limits': dict},
                    'volumeMounts': [NAMED | {'mountPath*': str}],
                  }
                ],
                'volumes': [
                  NAMED
                  | {
                    'persistentVolumeClaim': {'claimName*': str},
                    'emptyDir': {'medium': {'Memory'}},
                  }
                ],
              }
            },
          }
        },
      }
    ],
  },
}
# The fields that we use of a task of SkyPilot; none of them must be there.
TASK = {
  'name': str,
  'workdir': str,
  'num_nodes': int,
  'resources': {
    'accelerators': str,
    'use_spot': bool,
    'disk_size': int,
    'job_recovery': {
      'strategy': {'FAILOVER', 'EAGER_NEXT_REGION'},
      'max_restarts_on_errors': int,
      'recover_on_exit_codes': [int],
    },
  },
  'envs': dict,
  'file_mounts': dict,
  'setup': str,
  'run': str,
}


def check(value, kind, where=''):
  """Raises where a value is not of a kind."""
  if isinstance(kind, dict):
    assert isinstance(value, dict), f'{where}: wanted a mapping'
    fields = {name.rstrip('*'): inner for name, inner in kind.items()}
    needed = {name[:-1] for name in kind if name.endswith('*')}
    assert needed <= value.keys() <= fields.keys(), f'{where}: {sorted(value)}'
    for name, inner in value.items():
      check(inner, fields[name], f'{where}.{name}')
  elif isinstance(kind, list):
    assert isinstance(value, list) and value, f'{where}: wanted a list'
    for index, inner in enumerate(value):
      check(inner, kind[0], f'{where}[{index}]')
  elif isinstance(kind, set):
    assert value in kind, f'{where}: {value!r} is none of {kind}'
  else:
    assert type(value) is kind, f'{where}: {value!r} is no {kind.__name__}'


def _job(jobset):
  """Returns (replicated job, its Job, its pod, its container)."""
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  return replicated, job, pod, container


@pytest.fixture(params=JOBSETS, ids=lambda jobset: jobset['metadata']['name'])
def jobset(request):
  return request.param


def test_jobsets_have_the_fields_of_their_definition(jobset):
  check(jobset, JOBSET)
  names = [jobset['metadata']['name'], _job(jobset)[0]['name']]
  assert all(re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', n) for n in names)


@pytest.mark.parametrize('path', ['spec.replicatedJobs.0.name', 'kind'])
def test_a_missing_field_is_found(path):
  (text, *_) = (LAUNCH / 'jobset.yaml').read_text().split('---\n')
  broken = yaml.safe_load(text)
  *inside, last = path.split('.')
  place = broken
  for key in inside:
    place = place[int(key) if key.isdigit() else key]
  del place[last]
  with pytest.raises(AssertionError):
    check(broken, JOBSET)
  place[last] = 1
  with pytest.raises(AssertionError):
    check(broken, JOBSET)
  place[last + 's'] = place.pop(last)
  with pytest.raises(AssertionError):
    check(broken, JOBSET)


def test_labels_choose_one_jobset():
  labels = [j['metadata']['labels']['accelerator'] for j in JOBSETS]
  assert labels == ['gpu', 'tpu']
  text = (LAUNCH / 'jobset.yaml').read_text()
  assert f'--selector=accelerator={labels[0]}' in text
  assert f'jobset-name={JOBSETS[0]["metadata"]["name"]} ' in text


def test_pods_of_a_jobset_are_one_job(jobset):
  replicated, job, pod, container = _job(jobset)
  assert job['parallelism'] == job['completions'] > 1
  # A pod that failed is not started again by itself.
  assert (job['backoffLimit'], pod['restartPolicy']) == (0, 'Never')
  mounts = {mount['name'] for mount in container['volumeMounts']}
  assert mounts == {volume['name'] for volume in pod['volumes']}
  env = {entry['name']: entry.get('value') for entry in container['env']}
  if jobset['metadata']['labels']['accelerator'] == 'gpu':
    assert set(distributed.ADDRESS) <= env.keys()
    assert int(env['JAX_NUM_PROCESSES']) == job['completions']
    name = jobset['metadata']['name']
    first = f'{name}-{replicated["name"]}-0-0.{name}'
    assert re.fullmatch(rf'{first}:\d+', env['JAX_COORDINATOR_ADDRESS'])
    assert env['JAX_PROCESS_ID'] is None  # from the pod's index
  else:
    assert not env.keys() & set(distributed.ADDRESS)  # GKE says it
    chips = container['resources']['limits']['google.com/tpu']
    sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
    product = int(sides[0]) * int(sides[1]) * int(sides[2])
    assert product == chips * job['completions']


def test_only_preemption_starts_a_jobset_again(jobset):
  _, job, _, container = _job(jobset)
  preempted, failed = jobset['spec']['failurePolicy']['rules']
  assert preempted['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert preempted['onJobFailureReasons'] == ['PodFailurePolicy']
  assert failed == {'name': failed['name'], 'action': 'FailJobSet'}
  codes, conditions = job['podFailurePolicy']['rules']
  assert codes['onExitCodes']['values'] == [143]
  assert codes['onExitCodes']['containerName'] == container['name']
  assert conditions['onPodConditions'][0]['type'] == 'DisruptionTarget'


def test_jobsets_start_a_command_that_exists(jobset):
  command = _job(jobset)[3]['command']
  assert command[:2] == ['bash', 'launch/local.sh']
  test_docs.check(command)
  assert any(word.startswith('--config.workdir=/') for word in command)


def test_skypilot_task_has_documented_fields():
  check(SKY, TASK)
  for broken in ({'num_node': 2}, {'resources': {'spot': True}}, {'run': 1}):
    with pytest.raises(AssertionError):
      check(SKY | broken, TASK)
  recovery = SKY['resources']['job_recovery']
  assert recovery['recover_on_exit_codes'] == [143]
  assert recovery['max_restarts_on_errors'] == 0
  assert SKY['file_mounts'] == {
    '/shared': {'name': '${BUCKET}', 'mode': 'MOUNT'}
  }
  test_docs.check(SKY['setup'].split())


def test_skypilot_task_tells_every_node_who_it_is(tmp_path):
  """Its `run` for real, with a trainer that prints what it is given."""
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'launch/local.sh').write_text(
    'env | grep JAX; echo "args=$*"; exit 143\n'
  )
  for rank in range(2):
    result = subprocess.run(
      ['bash', '-c', SKY['run']],
      cwd=tmp_path,
      env={
        'PATH': '/usr/bin:/bin',
        'SKYPILOT_NODE_IPS': '10.0.0.7\n10.0.0.8',
        'SKYPILOT_NUM_NODES': '2',
        'SKYPILOT_NODE_RANK': str(rank),
        'FLAGS': SKY['envs']['FLAGS'],
      },
      check=False,
      capture_output=True,
      text=True,
    )
    assert result.returncode == 143
    said = dict(line.split('=', 1) for line in result.stdout.splitlines())
    assert said['JAX_COORDINATOR_ADDRESS'] == '10.0.0.7:8476'
    assert (said['JAX_NUM_PROCESSES'], said['JAX_PROCESS_ID']) == (
      '2',
      f'{rank}',
    )
    test_docs.check(['bash', 'launch/local.sh', *said['args'].split()])
