from explore3 import *
def kof(d):
    N=d['N'] if np.isfinite(d['N']) else 1.
    return 0. if d['clean'] else 1. if N>=.05 else .7
def few(r):
    d=r['few']; m=d['m']; S=d['S']; i1=2; o={}
    Sr=S.min(0); R=d['only']['R']; tr=d['train'][i1]; k=kof(d); Rr=R.min(0)
    V=tr+k*(Rr-tr); has=d['w']>0; N=d['N'] if np.isfinite(d['N']) else 1.
    comb=lambda a,b,m0:(m*a+m0*b)/(m+m0)
    T_l=T[S.argmin(0)]; T_ll=T[d['LL'].argmin(0)]; T_e=T[R.argmin(0)]
    o['few never']=(r['E']-1,T_ll); o['tenth Brier']=(low(S[i1]),T_l); o['tenth error']=(low(d['err']),T_l); o['tenth refined']=(low(Sr),T_l); o['monitor today']=(low(d['crit']),T_l)
    m0=200 if has else 40
    o['V1 m0 with V']=(low(comb(Sr,V,m0)),T_l)
    o['V1 m0/2 with V']=(low(comb(Sr,V,m0/2)),T_l)
    o['V1 m0/4 with V']=(low(comb(Sr,V,m0/4)),T_l)
    o['V2 m0*k est']=(low(comb(Sr,Rr,m0*k)),T_l)
    o['V2 m0*k/2 est']=(low(comb(Sr,Rr,m0*k/2)),T_l)
    o['V3 m0 if N>.05 else 0']=(low(comb(Sr,Rr,m0 if N>=.05 else 0)),T_l)
    o['V3 m0/2 if N>.05 else 0']=(low(comb(Sr,Rr,m0/2 if N>=.05 else 0)),T_l)
    k2=.0 if d['clean'] else 1. if N>=.05 else .25
    o['V2 .25']=(low(comb(Sr,Rr,m0*k2)),T_l)
    o['V2 .25/2']=(low(comb(Sr,Rr,m0*k2/2)),T_l)
    o['V4 same T, m0*k']=(low(comb(S,R,m0*k).min(0)),T_l)
    return o
def full(r):
    f=r['full']; i1=2; R=f['R']; tr=f['train'][i1]; k=kof(f); Rr=R.min(0); N=f['N'] if np.isfinite(f['N']) else 1.; q=f['Q'][i1] if 'Q' in f else 0*tr
    Te=T[R.argmin(0)]; one=np.ones(r['E']); V=tr+k*(Rr-tr)
    o={'never':(r['E']-1,Te),'criterion':(low(f['crit']),Te),'V':(low(V),Te),'V+2(1-Q) N>=.15':(low(V+(N>=.15)*2*(1-q)),Te),'V+2(1-Q) N>=.05':(low(V+(N>=.05)*2*(1-q)),Te),'V+(1-Q) N>=.05':(low(V+(N>=.05)*(1-q)),Te)}
    return o
if __name__=='__main__':
    runs=load(POOLS_DESIGN); rows=[]
    for name,r in runs.items():
        best=r['full']['acc'].max(); bl=r['full']['loss'].min(); blT=min(r['full']['testlossT'].min(0))
        for rules,d in ((full(r),r['full']),(few(r),r['few'])):
            for k,(e,Ts) in rules.items():
                i=int(np.argmin(abs(T-Ts[e])))
                rows.append((name,k,best-d['acc'][e],100*(d['loss'][e]/bl-1),100*(d['testlossT'][i][e]/bl-1)))
    t=pd.DataFrame(rows,columns=['run','rule','acc','loss','cal']); order=list(dict.fromkeys(t.rule)); out={}
    for k,names in kinds(runs).items():
        s=t[t.run.isin(names)].groupby('rule')[['acc','loss','cal']].mean(); out[f'{k} {len(names)}']=s['acc'].round(2).astype(str)+' / '+s['loss'].round(0).astype(int).astype(str)+' / '+s['cal'].round(1).astype(str)
    print(pd.DataFrame(out).loc[order].to_string())
