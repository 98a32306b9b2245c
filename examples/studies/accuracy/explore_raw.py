import sys; sys.path.insert(0,'/work/runs/studies/accuracy'); sys.path.insert(0,'/work/runs/studies/early_stopping')
from explore3 import *
import torch; torch.set_num_threads(1)
from people import draw_people, features_of
from lightning_sensitivity.functional import fit_reference, principal_components
from torch.nn.functional import one_hot
data=Path('/work/data')
for folder in sorted(glob.glob('/work/runs/people_*')):
    seed=int(folder.split('_')[-1])
    if seed>=1000 or not os.path.exists(folder+'/full.npz'): continue
    r=Rec(folder+'/full.npz')
    if 'training_raw' not in r.z or not r.learned: continue
    run=draw_people(seed,data); f=features_of(seed,data)
    at=torch.tensor(r.z['kept_indices']); xs=run.x[at]; xu=run.x_holdout[:600]
    xs,xu=(f([xs]),f([xu])) if f else (xs,xu)
    if f and torch.cat([xs,xu]).shape[1]<=50: pass
    a,b=principal_components(xs,xu); y=one_hot(run.y[at],10).double()
    rows=torch.linspace(0,len(a)-1,min(len(a),1000)).long()
    ref=fit_reference(a[rows],y[rows],b)
    old={k:float(r.z['reference_'+k]) for k in ('score','chance','claim','noise')}
    t0=r.terms()
    z=r.z; z['reference_predictions']=ref.predictions.numpy(); z['reference_shares']=ref.shares.numpy(); z['reference_leave_one_out']=ref.leave_one_out.numpy()
    for k in ('score','chance','claim','noise'): z['reference_'+k]=np.array(getattr(ref,k))
    t1=r.terms(); z2=z['training']; z['training']=z['training_raw']; t2=r.terms(); acc=r.get('acc'); i=2
    L=lambda c: round(float(acc.max()-acc[low(c)]),1)
    print(seed, r.kind[:70], '| skill %.2f->%.2f N %.2f->%.2f w %.2f->%.2f | lost never %.1f est %.1f rawref %.1f rawref+rawtrain %.1f R0 %.1f C %.1f Craw %.1f C2 %.1f true %.1f trueT %.1f'%(1-old['score']/old['chance'],ref.skill,old['noise'],ref.noise,t0['w'],t1['w'],L(np.arange(r.E)*-1.),L(t0['R'][i]),L(t1['R'][i]),L(t2['R'][i]),L(t0['R0'][i]),L(t0['C'][i]),L(t1['C'][i]),L(t2['C'][i]),L(r.make_true()[i]),L(r.make_true().min(0))),flush=True)
