import sys, glob, os
import numpy as np
from pathlib import Path
T = np.array([0.5,0.7,1,1.4,2,2.8,4,5.6,8,12])
def softmax(f):
    f=f-f.max(-1,keepdims=True); e=np.exp(f); return e/e.sum(-1,keepdims=True)
class Rec:
    def __init__(self, file):
        self.z=dict(np.load(file, allow_pickle=False)); z=self.z
        self.K=int(z['about_num_classes']); self.binary=bool(z['about_is_binary'])
        self.labels=str(z['about_labels']); self.n=int(z['about_n']); self.kind=str(z['about_kind'])
        self.E=len(z['test'])
        at=np.concatenate([np.arange(b*120,(b+1)*120) for b in z['unseen_batches']]); at=at[at<len(z['unseen_given'])]
        for k in ('unseen_given','unseen_noisy','unseen_correct'): z[k]=z[k][at]
    def logits(self,name):
        f=self.z[name].astype(np.float32)
        return np.concatenate([np.zeros_like(f),f],-1) if self.binary else f
    def get(self,name):
        if not hasattr(self,'_'+name): setattr(self,'_'+name,getattr(self,'make_'+name)())
        return getattr(self,'_'+name)
    def make_acc(self): return 100*(self.logits('test').argmax(-1)==self.z['test_labels']).mean(1)
    def make_loss(self):
        return self.test_loss(np.ones(self.E))
    def test_loss(self,temps):
        f=self.logits('test')/temps[:,None,None]; f=f-f.max(-1,keepdims=True)
        lse=np.log(np.exp(f).sum(-1)); y=self.z['test_labels']
        return (lse-np.take_along_axis(f,np.broadcast_to(y[None,:,None],f.shape[:2]+(1,)),-1)[...,0]).mean(1)
    def make_true(self):  # refined with test_noisy
        return self.scores(self.logits('test'), self.z['test_noisy'])
    scale = property(lambda self: 0.5 if self.binary else 1.0)
    def scores(self,f,y):  # (T,E) Brier
        out=[]
        for t in T:
            p=softmax(f/t); py=np.take_along_axis(p,np.broadcast_to(y[None,:,None],p.shape[:2]+(1,)),-1)[...,0]
            out.append((1+(p*p).sum(-1)-2*py).mean(1))
        return self.scale*np.array(out)
    def terms(self, raw=False, mask=None):
        z=self.z; sc=self.scale
        f=self.logits('unseen'); tw=self.z['twins'].astype(np.float32)
        base=self.logits('baseline') if 'baseline' in z else f
        if mask is not None: f,base,tw=f[:,mask],base[:,mask],tw[:,mask]
        tr=self.logits('training'); y=z['scored_labels']; ok=y>=0
        tr=tr[:,ok]; y=y[ok]
        n,w=float(z['num_training']),float(z['num_weights']); fac=min(1,np.sqrt(np.sqrt(w)/n))
        Q=z.get('reference_predictions'); 
        if Q is not None and mask is not None: Q=Q[mask]
        out={k:[] for k in ('claim','over','mem','var','train','C','agree','Q','ctr')}
        if Q is not None:
            shares=z['reference_shares']
            if self.binary:
                Q=np.stack([1-Q[:,0],Q[:,0]],1); shares=np.array([1-shares[0],shares[0]])
        for t in T:
            p=softmax(f/t); b=softmax(base/t)
            vs=[];tc=[]
            for j in range(tw.shape[2]):
                g=tw[:,:,j]; g=np.concatenate([np.zeros_like(g),g],-1) if self.binary else g
                q=softmax(g/t); vs.append(sc*((b-q)**2).sum(-1).mean(1)); tc.append(sc*(1-(q*q).sum(-1)).mean(1))
            v=np.mean(vs,0); tcl=np.mean(tc,0); bcl=sc*(1-(b*b).sum(-1)).mean(1)
            ptr=softmax(tr/t); py=np.take_along_axis(ptr,np.broadcast_to(y[None,:,None],ptr.shape[:2]+(1,)),-1)[...,0]
            s_tr=sc*(1+(ptr*ptr).sum(-1)-2*py).mean(1); c_tr=sc*(1-(ptr*ptr).sum(-1)).mean(1)
            claim=sc*(1-(p*p).sum(-1)).mean(1)
            over=s_tr-c_tr; over=np.where(over>0,over,over/2); mem=np.clip(claim-c_tr,0,None)
            shr=np.clip(np.nan_to_num(bcl/tcl,nan=1.0),None,1); var=fac*v/0.25*shr
            out['claim'].append(claim); out['over'].append(over); out['mem'].append(mem); out['var'].append(var); out['train'].append(s_tr); out['ctr'].append(c_tr)
            if Q is not None:
                ag=sc*(p*(Q-shares)).sum(-1).mean(1); bysh=sc*(p*shares).sum(-1).mean(1)
                Y=np.eye(p.shape[-1])[y]; tag=sc*(ptr*(Y-shares)).sum(-1).mean(1)
                largest=np.maximum.accumulate(np.maximum(ag,0)); ratio=np.inf; C=[]
                for e in range(len(ag)):
                    if ag[e]>max(.15*largest[e],1e-4): ratio=min(ratio,tag[e]/ag[e])
                    c=min(max(ratio,1),3)
                    C.append(sc*1+sc*(p[e]**2).sum(-1).mean()-2*(bysh[e]+c*ag[e]))
                out['C'].append(np.array(C))
                out['Q'].append(np.take_along_axis(np.broadcast_to(Q,p.shape),p.argmax(-1)[...,None],-1)[...,0].mean(1))
        out={k:np.array(v) for k,v in out.items() if len(v)}
        out['R0']=out['claim']+out['over']+out['mem']+out['var']
        w=0.0
        if Q is not None: w=self.weight()
        out['w']=w
        out['R']=(out['R0']+w*out['C'])/(1+w) if w>0 else out['R0']
        out['N']=float(z['reference_noise']) if 'reference_noise' in z else np.nan
        out['clean']=bool(out['N']<.05 and float(z['reference_claim'])>=1.3*float(z['reference_score'])) if 'reference_score' in z else False
        return out
    def weight(self):
        z=self.z; s,ch,cl=(float(z['reference_'+k]) for k in ('score','chance','claim')); m=len(z['reference_leave_one_out'])
        ramp=lambda v:min(max(v,0),1)
        sk=1-s/ch if ch>1e-12 else 0
        return 2*ramp((sk-max(.01,1.5/m))/.02)*(ramp((1.3-cl/s)/.15) if s>1e-12 else 0)*min(1,m/float(z['num_training']))
    @property
    def learned(self):
        a=self.get('acc'); K=self.K
        return a.max()/100>min(2,.5+.4*K)/K and np.isfinite(self.get('loss')).all()
