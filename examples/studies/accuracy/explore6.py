from explore5 import *
runs=load(POOLS_DESIGN); rows=[]
def sharedC(f):  # cannot recompute exactly; approximates with c from stored? skip
    return None
G={'all':range(10),'.5-4 (7)':range(7),'.5-2 (5)':range(5),'.5,1,2':[0,2,4],'.5,.7,1,2,4':[0,1,2,4,6],'.7,1,2,4':[1,2,4,6],'.5,1,2,4':[0,2,4,6]}
for name,r in runs.items():
    f=r['full']; best=f['acc'].max(); bl=f['loss'].min(); i1=2
    for g,ix in G.items():
        R=f['R'][list(ix)]; tr=f['train'][i1]; k=kof(f); e=low(tr+k*(R.min(0)-tr)); t=list(ix)[int(R[:,e].argmin())]
        rows.append((name,g,best-f['acc'][e],100*(f['loss'][e]/bl-1),100*(f['testlossT'][t][e]/bl-1)))
    e=r['E']-1; rows.append((name,'never',best-f['acc'][e],100*(f['loss'][e]/bl-1),0))
    e=low(f['crit']); rows.append((name,'today',best-f['acc'][e],100*(f['loss'][e]/bl-1),0))
t=pd.DataFrame(rows,columns=['run','rule','acc','loss','cal']); order=list(dict.fromkeys(t.rule)); out={}
for k,names in kinds(runs).items():
    s=t[t.run.isin(names)].groupby('rule')[['acc','loss','cal']].mean(); out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)+' / '+s['cal'].round(1).astype(str)
print(pd.DataFrame(out).loc[order].to_string())
