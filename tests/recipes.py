"""The values of the papers for the pages that pre-train, written out.

A table has a value at a dotted key: of the config, or of what is built from
it (see `test_recipes.py`). What no paper states is our choice, by the methods'
notes. Learning rates and weight decay stand at steps of their schedule.
"""

K400 = 240_000  # clips
# Width, blocks, heads; of Hiera channels, blocks of its stages, heads.
VIT = {
  'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16),
  'H': (1280, 32, 16), 'g': (1408, 40, 16), 'G': (1664, 48, 16),
  'e': (1792, 56, 16),
}  # fmt: skip
HIERA = {
  'T': (96, (1, 2, 7, 2), 1), 'B': (96, (2, 3, 16, 3), 1),
  'B+': (112, (2, 3, 16, 3), 2), 'L': (144, (2, 6, 36, 4), 2),
  'H': (256, (2, 6, 36, 4), 4),
}  # fmt: skip
# Teachers from outside: size; of images also patch and positions.
MAE = {'B': 'facebook/vit-mae-base', 'L': 'facebook/vit-mae-large'}
VIDEOMAE = {'B': 'MCG-NJU/videomae-base', 'L': 'MCG-NJU/videomae-large'}
DINO = {'S': 'facebook/dino-vits16', 'B': 'facebook/dino-vitb16'}
DINO['L'] = 'facebook/dinov2-large'
OUTSIDE = {
  **{source: (size, 16, 'sincos_2d') for size, source in MAE.items()},
  **{source: (size, 16, 'learned') for size, source in DINO.items()},
  **{source: (size,) for size, source in VIDEOMAE.items()},
  DINO['L']: ('L', 14, 'learned'),
}
# What pages do otherwise.
OTHERWISE = {
  'salt_single_gpu.py': {'data.crop_aspect'},  # 4/3, as by default
  'kdhiera_single_gpu.py': {'teachers.distill'},  # no VideoMAE-S on the hub
}


def _at(place, **values):
  return {f'{place}.{key}': value for key, value in values.items()}


def _rise(lr, steps, start=0.0):
  """A warm-up; its middle tells how long it is, as a cosine begins flat."""
  half = steps // 2
  return {0: start, half: start + (lr - start) * half / steps, steps: lr}


CLIP = _at('data', frames=16, stride=4, size=(224, 224), sampling='window')
CLIP |= _at('data', auto_augment='', erase=0.0, repeats=1)
RESIZED = CLIP | _at('data', crop='random_resized', flip=True)
MULTI_SCALE = CLIP | _at('data', crop='multi_scale', flip=False)
ADAMW = _at('optim', rule='adamw', b1=0.9, b2=0.95, eps=1e-8, accumulate=1)
ADAMW |= _at('optim', schedule='cosine', layer_decay=1.0, decay_tokens=True)
NORMED_PIXELS = dict(pixel_norm='patch_channel', pixel_loss='mse')

# --- SALT, arXiv 2509.24317, and V-JEPA 2 as it is compared with there
JEPA = RESIZED | ADAMW | {
  **_at('data', crop_scale=(0.3, 1.0), crop_aspect=(0.75, 1.35)),
  **_at('optim', clip=0.02, clip_scope='joint'),
  **_at('method.vit', positions='rope_3d', rope_pairing='paired', drop_path=0),
  **_at('phases.latent_student', latent_loss='l1', target_norm='ln'),
  **_at('phases.latent_student.predictor', width=384, depth=12, num_heads=16),
  'phases.latent_student.predictor.num_mask_tokens': 2,
}  # fmt: skip


def _blocks(phase, short=(320, 656), long=(80, 1096)):
  both = dict(aspect=(0.75, 1.5), select='random_k', size_per='step')
  place = f'phases.{phase}.masks'
  return {
    f'masks.{phase}': {'short': short, 'long': long},
    **_at(f'{place}.0', blocks=8, scale=0.15, **both),
    **_at(f'{place}.1', blocks=2, scale=0.7, **both),
  }


def _salt(teacher, student):
  rise = {0: 2e-4, 5000: 4.125e-4, 10_000: 6.25e-4}
  decoder = dict(width=384, depth=12, num_heads=16, out_width=1536)
  return JEPA | _blocks('pixel_teacher') | _blocks('latent_student') | {
    'batch_size': 3072,
    'steps': {'pixel_teacher': 80_000, 'latent_student': 160_000},
    'shapes': {'pixel_teacher': VIT[teacher], 'latent_student': VIT[student]},
    'lr.pixel_teacher': rise | {45_000: 3.13e-4, 80_000: 1e-6},
    'lr.latent_student': rise | {85_000: 3.13e-4, 160_000: 1e-6},
    'wd.pixel_teacher': {0: 0.04, 20_000: 0.09272, 40_000: 0.22, 80_000: 0.4},
    'wd.latent_student': {0: 0.04, 80_000: 0.22, 160_000: 0.4},
    'teachers.latent_student': {'target': '@pixel_teacher'},
    **_at('phases.pixel_teacher.decoder', num_mask_tokens=2, **decoder),
    **_at('phases.pixel_teacher', **NORMED_PIXELS),
  }  # fmt: skip


def _vjepa2(size):
  return JEPA | _blocks('latent_student') | {
    'batch_size': 3072,
    'steps': {'latent_student': 240_000},
    'shapes': {'latent_student': VIT[size]},
    'lr.latent_student': {0: 2e-4, 10_000: 6.25e-4, 240_000: 1e-6},
    'wd.latent_student': {0: 0.04, 120_000: 0.22, 240_000: 0.4},
    'teachers.latent_student': {'target': '@ema/encoder'},
    'phases.latent_student.ema.encoder.momentum': (0.99925, 0.99925),
    'phases.latent_student.predictor.num_heads': 12,
  }  # fmt: skip


def _salt_single_gpu():
  less = 12**-0.5  # of 3,072 clips a twelfth
  masks = dict(short=(80, 160), long=(16, 272))
  return _salt('S', 'B') | {
    'batch_size': 256, 'data.size': (112, 112),
    'steps': {'pixel_teacher': 10_000, 'latent_student': 30_000},
    'masks.pixel_teacher': masks, 'masks.latent_student': masks,
    'lr.pixel_teacher': {2500: 6.25e-4 * less, 10_000: 1e-6 * less},
    'lr.latent_student': {0: 2e-4 * less, 7500: 6.25e-4 * less},
    'wd.pixel_teacher': {0: 0.04, 5000: 0.22, 10_000: 0.4},
    'wd.latent_student': {0: 0.04, 15_000: 0.22, 30_000: 0.4},
  }  # fmt: skip


# --- VideoMAE, arXiv 2203.12602
def _videomae(size, batch, lr, lr_end, width, depth, heads):
  end, phase = 1600 * (K400 // batch), 'phases.pixel_teacher'
  return MULTI_SCALE | ADAMW | {
    'batch_size': batch, 'optim.clip': 0.0, 'method.vit.drop_path': 0.0,
    'steps': {'pixel_teacher': end},
    'shapes': {'pixel_teacher': VIT[size]},
    # 40 epochs of 1,600, from 0: the code never hands its --warmup_lr on.
    'lr.pixel_teacher': _rise(lr, end // 40) | {end: lr_end},
    # `no_weight_decay` of modeling_pretrain.py names the mask token.
    'optim.decay_tokens': False,
    'wd.pixel_teacher': {0: 0.05, end: 0.05},
    'masks.pixel_teacher': {'tube': (160, 1408)},
    **_at(f'{phase}.encoder', positions='sinusoid_1d', qkv_bias='qv'),
    **_at(f'{phase}.decoder', width=width, depth=depth, num_heads=heads),
    **_at(phase, **NORMED_PIXELS),
  }  # fmt: skip


# --- LayerLock, arXiv 2509.10156. `ends`: steps of the run at which the phase
# with so many locked layers ends.
def _layerlock(size, batch, lr, count, ends):
  total = max(ends.values())
  warmup = min(10_000, total // 20)
  return RESIZED | ADAMW | {
    'batch_size': batch, 'optim.clip': 1.0, 'data.crop_scale': (0.3, 1.0),
    'shapes.pixels': VIT[size], 'count': count, 'masks.pixels': RANDOM,
    **{f'ends.{_lock(k)}': end for k, end in ends.items()},
    **{f'phases.{_lock(k)}.frozen_depth': k for k in ends},
    'lr.pixels': _rise(lr, warmup) | {total: 1e-6},
    'wd.pixels': {0: 0.05, total: 0.05},
    'phases.pixels.rewarm': (0, 1.0), 'phases.pixels.terms': ('pixel',),
    **_at('phases.pixels.encoder', positions='rope_post_norm', gelu='tanh'),
    **_at('phases.pixels.encoder', decoder_blocks=4, final_norm=False),
    **_at('phases.pixels.encoder', mean=(0.0,) * 3, std=(1.0,) * 3),
    **_at('method', pixel_norm='patch_channel', target_norm='ln'),
    **_at('method', positions='all', target_layers='newest'),
  }  # fmt: skip


def _lock(k):
  return f'lock_{k:02d}' if k else 'pixels'


def _latent(k, rewarm, terms=('latent',)):
  """The last phase, and how many of its steps the rate rises from a tenth."""
  return _at(f'phases.{_lock(k)}', rewarm=(rewarm, 0.1), terms=terms)


RANDOM = {'random': (78, 1490)}
BLOCKS = {'long': (80, 1096)}
ENDS_G = {0: 160_000, 1: 170_000, 2: 180_000, 31: 470_000, 32: 480_000}
ENDS_L = {0: 33_333, 1: 37_500, 2: 41_666, 15: 95_833, 16: 100_000}
ENDS_E = {0: 162_760, 1: 171_558, 2: 180_356, 36: 479_483, 37: 488_281}
ENDS_SMALL = {0: 10_000, 1: 12_500, 2: 15_000, 7: 27_500, 8: 30_000}
LOCKS_G = _layerlock('G', 2048, 1e-4, 33, ENDS_G)
LOCKS_L = _layerlock('L', 1024, 3e-4, 17, ENDS_L)
SMALL = {'data.size': (112, 112), 'masks.pixels': {'random': (19, 373)}}
LOCKS_SMALL = _layerlock('B', 256, 1.5e-4, 9, ENDS_SMALL) | SMALL
SUBSET = _at('method', positions='subset', subset=0.05, subset_context='subset')
CONTROL = LOCKS_L | _latent(16, 417, ('pixel', 'latent')) | {
  **{f'phases.{_lock(k)}.frozen_depth': 0 for k in ENDS_L},
  'method.latent_weight': 'constant',
}  # fmt: skip


def _locked_vjepa():
  masks, place = _blocks('lock_00') | _blocks('lock_16'), 'phases.lock_16'
  shared = ('optim', 'data', 'batch_size')
  return {k: v for k, v in LOCKS_L.items() if k.startswith(shared)} | masks | {
    'count': 17, 'ends.lock_00': 33_333, 'ends.lock_16': 100_000,
    'lr.lock_00': _rise(3e-4, 5000) | {100_000: 1e-6},
    'shapes.lock_00': VIT['L'], 'teachers.lock_16': {'target': '@ema/encoder'},
    'phases.lock_00.target_layer': 1, 'phases.lock_00.frozen_depth': 0,
    'phases.lock_00.ema.encoder.momentum': (0.99925, 0.99925),
    **_at(place, target_layer=17, frozen_depth=16, latent_loss='l1'),
    **_at(f'{place}.predictor', width=384, depth=12),
    'phases.lock_16.target_norm': 'ln',
  }  # fmt: skip


# --- MVD, arXiv 2212.04500, and PMD (CVPR 2026)
def _mvd(size, batch, lr, lr_end, clips, epochs, warmup, decoder):
  epoch, width, depth, heads = clips // batch, *decoder
  end, teachers = epochs * epoch, 'L' if size == 'L' else 'B'
  last, masks = 'phases.mask_90.student', {'tube': (160, 1408)}
  decoder = dict(width=width, depth=depth, num_heads=heads, drop_path=0.1)
  return MULTI_SCALE | ADAMW | {
    'batch_size': batch, 'data.examples': clips, 'optim.clip': 0.0,
    'count': 1, 'steps.mask_90': end, 'masks.mask_90': masks,
    'shapes.mask_90': VIT[size], f'{last}.encoder.drop_path': 0.1,
    'lr.mask_90': _rise(lr, warmup * epoch) | {end: lr_end},
    'wd.mask_90': {0: 0.05, end: 0.05},
    'teachers.mask_90': {'image': MAE[teachers], 'video': VIDEOMAE[teachers]},
    **_at(f'{last}.decoder.image', out_width=VIT[teachers][0], **decoder),
    **_at(f'{last}.decoder.video', out_width=VIT[teachers][0], **decoder),
    **_at('method', lambda_base=1.0, lambda_pg=0, lambda_df=0, lambda_al=0),
    **_at('method', feature_loss='smooth_l1', target_norm='none'),
  }  # fmt: skip


RATIOS = {75: (392, 1176), 80: (320, 1248), 85: (240, 1328), 90: (160, 1408)}


def _pmd(mvd, window, dtype):
  """Four phases in place of one; the window is in epochs."""
  epoch = mvd['data.examples'] // mvd['batch_size']
  steps, teachers = mvd['steps.mask_90'] // 4, mvd['teachers.mask_90']
  rows = dict(dtype=dtype, window=window * epoch, shape=(1568,))
  own = {}
  for ratio, tokens in RATIOS.items():
    before = {} if ratio == 75 else {'previous': f'@mask_{ratio - 5}'}
    own |= {
      f'steps.mask_{ratio}': steps, f'masks.mask_{ratio}': {'tube': tokens},
      f'teachers.mask_{ratio}': teachers | before,
      f'phases.mask_{ratio}.carry': ('params', 'opt') if before else (),
      **_at(f'phases.mask_{ratio}.memory_specs.image', **rows),
      **_at(f'phases.mask_{ratio}.memory_specs.video', **rows),
    }  # fmt: skip
  own |= _at('method', lambda_pg=0.05, lambda_df=1.0, lambda_al=1.0, tau=0.5)
  own |= _at('method', alpha=0.95, dare='both', df_extra_mean=False)
  own |= _at('method', previous_mask='nested', pg_positions='masked')
  own |= _at('method', align_norm='none', opt='carry')
  return mvd | own | {'method.feature_loss': 'mse', 'count': 4}


MVD = {
  'S': _mvd('S', 1024, 6e-4, 4e-4, K400, 400, 40, (384, 2, 6)),
  'B': _mvd('B', 1024, 6e-4, 4e-4, K400, 400, 40, (768, 2, 12)),
  'L': _mvd('L', 512, 3e-4, 2e-4, K400, 400, 40, (512, 4, 8)),
}
MVD_SMALL = _mvd('S', 256, 1.5e-4, 1e-4, 50_000, 40, 4, (384, 2, 6))


# --- Hiera-MAE, arXiv 2306.00989, and KDHiera, interpretation of the abstract
def _hiera(size, lr, drop_path, batch=512, clips=K400, epochs=3200, warmup=120):
  epoch = clips // batch
  return RESIZED | ADAMW | {
    'batch_size': batch, 'optim.clip': 0.0, 'data.crop_scale': (0.5, 1.0),
    'data.repeats': 4, 'data.examples': clips, 'shapes.distill': HIERA[size],
    'steps': {'distill': epochs * epoch}, 'masks.distill': {'': (39, 353)},
    'lr.distill': _rise(lr, warmup * epoch) | {epochs * epoch: 0},
    'wd.distill': {0: 0.05, epochs * epoch: 0.05}, 'teachers.distill': {},
    **_at('phases.distill.encoder', drop_path=drop_path, q_pool=2),
    **_at('method', objective='pixels', units='random', pixel_norm='patch'),
    **_at('phases.distill.heads.pixels', width=512, depth=8, num_heads=8),
  }  # fmt: skip


def _kdhiera(size, lr, drop_path, image, video, layers, **run):
  table = _hiera(size, lr, drop_path, **{'epochs': 300, 'warmup': 40} | run)
  table = {k: v for k, v in table.items() if 'heads.pixels' not in k}
  return table | {
    'data.repeats': 2, 'masks.distill': {'': (40, 352)},
    'teachers.distill': {'image': image, 'video': video},
    **_at('method', objective='visible', units='attention', scores='cls'),
    **_at('method', selection='sample', tube=False, mask_teacher='image'),
    **_at('method', feature_loss='cosine', target_norm='ln', layer_weights=()),
    **_at('method', stages=(1, 2, 3, 4), mask_ratio=0.9, masks_per_clip=1),
    **_at('method.image', weight=1.0, layers=layers),
    **_at('method.video', weight=1.0, layers=layers),
  }  # fmt: skip


QUARTERS = {12: (3, 6, 9, 12), 24: (6, 12, 18, 24)}  # of a teacher's blocks
KDHIERA_B = _kdhiera('B', 8e-4, 0.1, DINO['B'], VIDEOMAE['B'], QUARTERS[12])
KDHIERA_L = _kdhiera('L', 8e-4, 0.2, DINO['L'], VIDEOMAE['L'], QUARTERS[24])
FIFTY = dict(batch=256, clips=50_000, epochs=50, warmup=5)
KDHIERA_T = _kdhiera(
  *('T', 5.657e-4, 0.1, DINO['S'], 'VideoMAE-S', QUARTERS[12]), **FIFTY
)
HIERA_T = _hiera('T', 5.657e-4, 0.1, **FIFTY) | {'data.repeats': 2}

# Teachers of the run's own, before the student.
OWN = {'image': '@image_teacher', 'video': '@video_teacher'}
OF_OWN = ('image_teacher', 'video_teacher')
SCRATCH = {
  'batch_size': 192, 'data.examples': 9537,
  **{f'shapes.{name}': VIT['S'] for name in OF_OWN},
}  # fmt: skip
MADE = {
  'masks.image_teacher': {'frames': (392, 1176)},
  'masks.video_teacher': {'tube': (160, 1408)},
  'phases.image_teacher.pixel_norm': 'patch',
  'phases.video_teacher.pixel_norm': 'patch_channel',
}  # fmt: skip
PMD_SELF = _pmd(MVD['B'] | {'teachers.mask_90': OWN}, 32, 'float16') | MADE
KDHIERA_SELF = KDHIERA_B | MADE | {
  'teachers.distill': OWN, 'method.scores': 'column_mean', 'count': 3,
}  # fmt: skip
KDHIERA_SELF['steps.distill'] = KDHIERA_SELF.pop('steps')['distill']

RECIPES = {
  **{f'salt.py:{s}': _salt('B' if s == 'B' else 'L', s) for s in 'BLHgG'},
  'salt_single_gpu.py': _salt_single_gpu(),
  **{f'vjepa2.py:{s}': _vjepa2(s) for s in 'BLH'},
  'videomae_k400.py:S': _videomae('S', 2048, 1.2e-3, 8e-5, 192, 4, 3),
  'videomae_k400.py:B': _videomae('B', 2048, 1.2e-3, 8e-5, 384, 4, 6),
  'videomae_k400.py:L': _videomae('L', 512, 3e-4, 2e-5, 512, 12, 8),
  'layerlock_2b.py:S': _layerlock('S', 1024, 3e-4, 9, {8: 100_000}),
  'layerlock_2b.py:B': _layerlock('B', 1024, 3e-4, 9, {8: 100_000}),
  'layerlock_2b.py:L': LOCKS_L | _latent(16, 417),
  'layerlock_2b.py:H': _layerlock('H', 1024, 3e-4, 22, {21: 100_000}),
  'layerlock_2b.py:G': LOCKS_G | _latent(32, 1000),
  'layerlock_2b.py:L-mae': _layerlock('L', 1024, 3e-4, 1, {0: 100_000}),
  'layerlock_2b.py:L-pixels': LOCKS_L | _latent(16, 417, ('pixel',)),
  'layerlock_2b.py:L-subset': LOCKS_L | _latent(16, 417) | SUBSET,
  'layerlock_2b.py:L-control': CONTROL,
  'layerlock_2b.py:L-control-block': CONTROL | {'masks.pixels': BLOCKS},
  'layerlock_2b.py:vjepa': _locked_vjepa(),
  'layerlock_4b.py': _layerlock('e', 2048, 1e-4, 38, ENDS_E),
  'layerlock_4b.py:mae': _layerlock('e', 2048, 1e-4, 1, {0: 488_281}),
  'layerlock_single_gpu.py': LOCKS_SMALL | _latent(8, 250),
  'layerlock_single_gpu.py:subset': LOCKS_SMALL | SUBSET,
  'layerlock_single_gpu.py:pixels': LOCKS_SMALL | _latent(8, 250, ('pixel',)),
  'layerlock_single_gpu.py:mae': (
    _layerlock('B', 256, 1.5e-4, 1, {0: 30_000}) | SMALL
  ),
  **{f'mvd_k400.py:{size}': MVD[size] for size in MVD},
  **{f'pmd_k400.py:{size}': _pmd(MVD[size], 32, 'float16') for size in MVD},
  'pmd_k400.py:B-self': PMD_SELF | {'count': 6},
  'pmd_single_gpu.py': _pmd(MVD_SMALL, 3, 'float32'),
  'pmd_single_gpu.py:mvd': MVD_SMALL | {'method.feature_loss': 'mse'},
  'pmd_single_gpu.py:mvd-flops': {'steps': {'mask_90': 43 * 195}},
  'pmd_scratch_ucf101.py': SCRATCH
  | {
    'lr.mask_75': _rise(1.125e-4, 20 * 49),
    'count': 6,
    'steps': dict.fromkeys(OF_OWN, 100 * 49)
    | {f'mask_{ratio}': 50 * 49 for ratio in (75, 80, 85, 90)},
  },
  'kdhiera_scratch.py': SCRATCH
  | {
    'lr.distill': _rise(4.899e-4, 10 * 49),
    'teachers.distill': OWN,
    'steps': dict.fromkeys((*OF_OWN, 'distill'), 100 * 49),
    'shapes.distill': HIERA['T'],
    'method.mask_ratio': 0.9,
  },
  'hiera_mae_k400.py:B': _hiera('B', 8e-4, 0.1),
  'hiera_mae_k400.py:B+': _hiera('B+', 8e-4, 0.2),
  'hiera_mae_k400.py:L': _hiera('L', 8e-4, 0.2),
  'hiera_mae_k400.py:H': _hiera('H', 3.2e-4, 0.4),
  'kdhiera_k400.py:B': KDHIERA_B,
  'kdhiera_k400.py:L': KDHIERA_L,
  'kdhiera_k400.py:B-self': KDHIERA_SELF,
  'kdhiera_single_gpu.py': KDHIERA_T,
  'kdhiera_single_gpu.py:mae': HIERA_T,
}
