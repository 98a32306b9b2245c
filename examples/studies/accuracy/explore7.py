from explore5 import *
runs=load(POOLS_DESIGN); rows=[]
G={'all':range(10),'7':range(7),'8':range(8),'5':[0,1,2,4,6],'odd':[0,2,4,6,8]}
cnt=[]
for name,r in runs.items():
    d=r['few']; best=r['full']['acc'].max(); bl=r['full']['loss'].min()
    for g,ix in G.items():
        ix=list(ix); S=d['S'][ix]; e=low(S.min(0)); t=ix[int(S[:,e].argmin())]
        S6=r['full']['noisyS'][ix]; e6=low(S6.min(0)); t6=ix[int(S6[:,e6].argmin())]; f=r['full']
        if g=='all': cnt.append(T[t6])
        rows.append((name,'tenth '+g,best-d['acc'][e],100*(d['loss'][e]/bl-1),100*(d['testlossT'][t][e]/bl-1)))
        rows.append((name,'600 '+g,best-f['acc'][e6],100*(f['loss'][e6]/bl-1),100*(f['testlossT'][t6][e6]/bl-1)))
t=pd.DataFrame(rows,columns=['run','rule','acc','loss','cal']); order=sorted(set(t.rule)); out={}
for k,names in kinds(runs).items():
    s=t[t.run.isin(names)].groupby('rule')[['acc','loss','cal']].mean(); out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)+' / '+s['cal'].round(1).astype(str)
print(pd.DataFrame(out).loc[order].to_string()); print(np.unique(np.round(cnt,1),return_counts=True))
