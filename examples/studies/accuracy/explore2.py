from explore import *
import pandas as pd, pickle, hashlib
POOLS_DESIGN = lambda p,s: (p=='people' and s<100) or (p!='people' and s<1000)
def analyse(folder):
    """All curves of a run, both trainings."""
    full=Rec(f'{folder}/full.npz')
    if not full.learned: return None
    few=Rec(f'{folder}/fewer.npz')
    out={'kind':full.kind,'labels':full.labels,'n':full.n,'K':full.K,'aug':bool(full.z['about_is_augmented']),'bn':bool(full.z['about_has_batch_norm']),'sched':str(full.z['about_schedule']),'binary':full.binary,'E':full.E}
    out['wrong']=float((full.z['train_labels']!=full.z['train_correct']).mean())
    for name,r in (('full',full),('few',few)):
        d=r.terms()
        d['acc'],d['loss']=r.get('acc'),r.get('loss')
        d['testlossT']=np.array([r.test_loss(np.full(r.E,t)) for t in T])
        d['true']=r.make_true()
        d['crit']=r.z['val_risk_criterion']; d['est']=r.z['val_risk_estimate']
        if name=='few':
            m=r.z['unseen_given']>=0
            f=r.logits('unseen')[:, m]; y=r.z['unseen_given'][m]
            d['m']=int(m.sum()); d['S']=r.scores(f,y); d['err']=(f.argmax(-1)!=y).mean(1)
            d['only']=r.terms(mask=m)
            # log loss at T
            ll=[]
            for t in T:
                g=f/t; g=g-g.max(-1,keepdims=True); lp=g-np.log(np.exp(g).sum(-1,keepdims=True))
                ll.append(-np.take_along_axis(lp,np.broadcast_to(y[None,:,None],lp.shape[:2]+(1,)),-1)[...,0].mean(1))
            d['LL']=np.array(ll)
        else:
            d['noisyS']=r.scores(r.logits('unseen'),r.z['unseen_noisy'])
            if 'training_raw' in r.z:
                z=r.z; y=z['scored_labels']; ok=y>=0
                d['train_raw']=r.scores(r.logits('training_raw')[:,ok],y[ok])
            if 'val_output_sensitivity' in r.z:
                d['S']=r.z['val_output_sensitivity']; d['power']=float(r.z['input_power'])
            for k in ('score','chance','claim','noise'):
                if 'reference_'+k in r.z: d['ref_'+k]=float(r.z['reference_'+k])
        out[name]=d
    return out
def load(select, cache='/work/runs/cache'):
    os.makedirs(cache,exist_ok=True); res={}
    for folder in sorted(glob.glob('/work/runs/*_[0-9]*')):
        name=os.path.basename(folder); pool,_,seed=name.rpartition('_'); seed=int(seed)
        if not select(pool,seed) or not os.path.exists(folder+'/fewer.npz'): continue
        c=f'{cache}/{name}.pkl'
        if not os.path.exists(c): pickle.dump(analyse(folder),open(c,'wb'))
        d=pickle.load(open(c,'rb'))
        if d is not None: d['name']=name; d['pool']=pool; res[name]=d
    return res
