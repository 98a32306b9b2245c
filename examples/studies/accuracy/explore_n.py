from explore3 import *
SH=np.concatenate([[0,.01,.02,.03,.05],np.arange(.075,.86,.025)])
B=2.0**np.arange(-3,2.1,.5)
def share(f,y,K):
    """max-likelihood mean share from logits f (n,K)"""
    f=f-f.max(-1,keepdims=True); lp=f-np.log(np.exp(f).sum(-1,keepdims=True))
    ll=[]
    for b in B:
        g=b*lp; g=g-g.max(-1,keepdims=True); q=np.exp(g); q/=q.sum(-1,keepdims=True); py=q[np.arange(len(y)),y]
        ll.append(np.log(np.clip((1-SH)[:,None]*py[None]+SH[:,None]/K,1e-12,None)).sum(1))
    best=np.max(ll,0); w=np.exp(best-best.max())*np.gradient(SH)
    return (w*SH).sum()/w.sum()*(1-1/K)
if __name__=='__main__':
  for folder in sorted(glob.glob('/work/runs/*_[0-9]*')):
    if not os.path.exists(folder+'/fewer.npz'): continue
    r=Rec(folder+'/full.npz')
    if not r.learned: continue
    f=r.logits('training'); y=r.z['scored_labels']; ok=y>=0
    n=np.array([share(f[e][ok],y[ok],r.K) for e in range(r.E)])
    w=float((r.z['train_labels']!=r.z['train_correct']).mean())
    acc=r.get('acc')
    q=lambda p:n[min(r.E-1,int(p*r.E))]
    print(os.path.basename(folder).ljust(13),r.labels[:8].ljust(8),'wrong %.2f N %.2f max %.2f at %d/%d  start %.2f mid %.2f end %.2f | never %.1f acc max %.0f'%(w,float(r.z.get('reference_noise',np.nan)),n.max(),n.argmax(),r.E,n[0],q(.5),n[-1],acc.max()-acc[-1],acc.max()), r.kind[:60])
