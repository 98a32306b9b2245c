from explore2 import *
import warnings; warnings.filterwarnings('ignore')
def low(c): return int(np.nanargmin(c))
def vfrom(d, gate=.15):
    return d
def rules_full(r):
    f=r['full']; i1=2
    R=f['R']; tr=f['train'][i1]; N=f['N'] if np.isfinite(f['N']) else 0.
    noisy=N>=.15
    q=f['Q'][i1] if 'Q' in f else np.zeros_like(tr)
    Rref=R.min(0)
    out={'never':r['E']-1,'criterion':low(f['crit']),'estimate':low(f['est']),'R0':low(f['R0'][i1]),'est at best T':low(Rref),
     'C':low(f['C'][i1]) if 'C' in f else r['E']-1,
     'gate .15: est | train':low(f['est'] if noisy else tr),
     'gate .10':low(f['est'] if N>=.10 else tr),
     'gate .05':low(f['est'] if N>=.05 else tr),
     'gate .15: est T | train':low(Rref if noisy else tr),
     'gate .15: est | last':low(f['est']) if noisy else r['E']-1,
     'gate .15: est+2(1-Q) | train':low(f['est']+2*(1-q) if noisy else tr),
     'gate .15: estT+2(1-Q) | train':low(Rref+2*(1-q) if noisy else tr),
     'ramp N':low(tr+np.clip((N-.05)/.15,0,1)*(f['est']-tr)),
     '600 Brier':low(f['noisyS'][i1]),'600 refined':low(f['noisyS'].min(0)),
     'best true T':low(f['true'].min(0)),'true':low(f['true'][i1]),'best acc':int(f['acc'].argmax())}
    return out
def rules_few(r):
    d=r['few']; m=d['m']; S=d['S']; i1=2
    N=d['N'] if np.isfinite(d['N']) else 0.; noisy=N>=.15
    Sr=S.min(0); R=d['only']['R']; Ro=R[i1]; Rr=R.min(0); R2=d['R']
    m0=200 if d['w']>0 else 40
    comb=lambda a,b,m0:(m*a+m0*b)/(m+m0)
    tr=d['train'][i1]
    out={'few never':r['E']-1,'tenth Brier':low(S[i1]),'tenth error':low(d['err']),'tenth refined':low(Sr),'tenth LL':low(d['LL'][i1]),'tenth refined LL':low(d['LL'].min(0)),
     'monitor today':low(d['crit']),
     'A own T':low(comb(Sr,Rr,m0)),'B same T':low(comb(S,R,m0).min(0)),
     'A m0/4':low(comb(Sr,Rr,m0/4)),'B m0/4':low(comb(S,R,m0/4).min(0)),
     'C gate15 A | refined':low(comb(Sr,Rr,m0) if noisy else Sr),
     'D gate15 B | refined':low(comb(S,R,m0).min(0) if noisy else Sr),
     'E gate15 ref+est(T=1)|refined':low(comb(Sr,Ro,m0) if noisy else Sr),
     'F refined+.5 train? ':low(comb(Sr,tr,50)),
     'G gate15 A|ref+train100':low(comb(Sr,Rr,m0) if noisy else comb(Sr,tr,100)),
    }
    return out
def table(runs, group=None):
    rows=[]
    for name,r in runs.items():
        best=r['full']['acc'].max(); bl=r['full']['loss'].min()
        for rules,d in ((rules_full(r),r['full']),(rules_few(r),r['few'])):
            for k,e in rules.items(): rows.append((name,k,best-d['acc'][e],100*(d['loss'][e]/bl-1),e/r['E']))
    return pd.DataFrame(rows,columns=['run','rule','acc','loss','pos'])
def kinds(runs):
    g={'people scratch':[n for n,r in runs.items() if r['labels']=='people' and 'fine-tuned' not in r['kind']],
     'people finetuned':[n for n,r in runs.items() if r['labels']=='people' and 'fine-tuned' in r['kind']],
     'random':[n for n,r in runs.items() if r['labels']=='random'],'by class':[n for n,r in runs.items() if r['labels']=='by class'],
     'correct':[n for n,r in runs.items() if r['labels']=='correct']}
    return {k:v for k,v in g.items() if v}
if __name__=='__main__':
    runs=load(POOLS_DESIGN); t=table(runs); order=list(dict.fromkeys(t.rule))
    out={}
    for k,names in kinds(runs).items():
        s=t[t.run.isin(names)].groupby('rule')[['acc','loss']].mean()
        out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)
    print(pd.DataFrame(out).loc[order].to_string())
    for n,r in runs.items(): print(n.ljust(14),r['kind'][:95].ljust(95),f"N {r['full']['N']:.2f} w {r['full']['w']:.2f} m {r['few']['m']}", 'never %.1f crit %.1f ten %.1f ref %.1f'%tuple(t[(t.run==n)&(t.rule==k)].acc.iloc[0] for k in ('never','criterion','tenth Brier','tenth refined')))
