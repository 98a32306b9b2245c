from explore5 import *
# shared c: recompute C with the factor at T=1
def C_shared(r):
    z=r.z; sc=r.scale; f=r.logits('unseen'); tr=r.logits('training'); y=z['scored_labels']; ok=y>=0; tr=tr[:,ok]; y=y[ok]
    Q=z.get('reference_predictions')
    if Q is None: return None
    sh=z['reference_shares']
    if r.binary: Q=np.stack([1-Q[:,0],Q[:,0]],1); sh=np.array([1-sh[0],sh[0]])
    def ags(t):
        p=softmax(f/t); ptr=softmax(tr/t); Y=np.eye(p.shape[-1])[y]
        return sc*(p*(Q-sh)).sum(-1).mean(1), sc*(ptr*(Y-sh)).sum(-1).mean(1), sc*(p*sh).sum(-1).mean(1), sc*(p**2).sum(-1).mean(1)
    a1,t1,_,_=ags(1.0); largest=np.maximum.accumulate(np.maximum(a1,0)); ratio=np.inf; cs=[]
    for e in range(len(a1)):
        if a1[e]>max(.15*largest[e],1e-4): ratio=min(ratio,t1[e]/a1[e])
        cs.append(min(max(ratio,1),3))
    cs=np.array(cs); out=[]
    for t in T[:7]:
        a,_,b,p2=ags(t); out.append(sc*1+p2-2*(b+cs*a))
    return np.array(out)
runs=load(POOLS_DESIGN); rows=[]
for name,r in runs.items():
    f=r['full']; best=f['acc'].max(); bl=f['loss'].min(); tr=f['train'][2]; k=kof(f)
    V=lambda R: tr+k*(R[:7].min(0)-tr)
    rec=Rec(f'/work/runs/{name}/full.npz'); C=C_shared(rec)
    R2=f['R'] if C is None or f['w']==0 else (f['R0'][:7]+f['w']*C)/(1+f['w'])
    # reference term at T=1 only
    R3=f['R'] if C is None or f['w']==0 else (f['R0'][:7]+f['w']*f['C'][2])/(1+f['w'])
    for nm,R in (('own c',f['R']),('shared c',R2),('C at T=1',R3)):
        e=low(V(R)); rows.append((name,nm,best-f['acc'][e],100*(f['loss'][e]/bl-1)))
t=pd.DataFrame(rows,columns=['run','rule','acc','loss']); out={}
for k,names in kinds(runs).items():
    s=t[t.run.isin(names)].groupby('rule')[['acc','loss']].mean(); out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)
print(pd.DataFrame(out).to_string())
