from explore3 import *
def rules(r):
    f=r['full']; i1=2; R=f['R']; tr=f['train'][i1]; N=f['N'] if np.isfinite(f['N']) else 1.; Rr=R.min(0); trr=f['train'].min(0)
    clean=f['clean']; q=f['Q'][i1] if 'Q' in f else np.zeros_like(tr)
    o={'never':r['E']-1,'criterion':low(f['crit']),'crit T':low(tr if clean else Rr),'train':low(tr),'train refined':low(trr)}
    for th in (.02,.03,.04,.05,.075):
        o[f'est N>={th}']=low(R[i1] if N>=th else tr); o[f'estT N>={th}']=low(Rr if N>=th else tr)
    for a,b in ((.0,.05),(.0,.1),(.02,.08),(.03,.15)):
        k=np.clip((N-a)/(b-a),0,1); o[f'ramp {a} {b} est']=low(tr+k*(R[i1]-tr)); o[f'ramp {a} {b} estT']=low(tr+k*(Rr-tr))
    for k in (.3,.5,.7):
        o[f'k={k} estT']=low(tr+k*(Rr-tr)); o[f'clean->train else N>=.05 est, else k={k} estT']=low(tr if clean else Rr if N>=.05 else tr+k*(Rr-tr))
    o['true']=low(f['true'][i1]); o['true T']=low(f['true'].min(0))
    return o
runs=load(POOLS_DESIGN)
rows=[]
for name,r in runs.items():
    best=r['full']['acc'].max(); bl=r['full']['loss'].min()
    for k,e in rules(r).items(): rows.append((name,k,best-r['full']['acc'][e],100*(r['full']['loss'][e]/bl-1)))
t=pd.DataFrame(rows,columns=['run','rule','acc','loss']); order=list(dict.fromkeys(t.rule)); out={}
for k,names in kinds(runs).items():
    s=t[t.run.isin(names)].groupby('rule')[['acc','loss']].mean(); out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)
print(pd.DataFrame(out).loc[order].to_string())
for n,r in sorted(runs.items(),key=lambda x:x[1]['labels']): 
    f=r['full']; g=t[t.run==n].set_index('rule').acc
    print(n.ljust(14),r['labels'].ljust(8),r['kind'][:80].ljust(80),f"N {f['N']:.2f} cs {f.get('ref_claim',np.nan)/f.get('ref_score',np.nan):.2f} sk {1-f.get('ref_score',np.nan)/f.get('ref_chance',np.nan):.2f} clean {f['clean']}",'never %.1f crit %.1f critT %.1f train %.1f'%(g['never'],g['criterion'],g['crit T'],g['train']))
