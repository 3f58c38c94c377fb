import time, torch, sys
from pathlib import Path
from rheostat.lean import load_lean
from rheostat.spending import spend
from rheostat.runtime import batch as BM, prefill as PF, plain
from rheostat.runtime.batch import Batch
torch.set_num_threads(2)
adapted,_=load_lean(Path("/root/closed"))
T={}
def wrap(obj,name,key=None):
    f=getattr(obj,name)
    def g(*a,**k):
        t=time.perf_counter(); r=f(*a,**k); T.setdefault(key or name,[]).append(time.perf_counter()-t); return r
    setattr(obj,name,g)
with torch.inference_mode():
    rt=adapted.new_runtime("bf16"); rt.prepare()
    wrap(PF,"embed"); wrap(rt.biller,"prefill","bill"); wrap(rt,"new_cache"); wrap(plain,"product","head"); wrap(PF,"rms_norm","rms"); wrap(PF,"run_layers")
    wrap(BM.Prompt,"of","Prompt.of")
    for n in (512,2048):
        ids=torch.randint(3,40000,(1,n))
        for c in (1.0,0.6):
            T.clear(); tot=[]
            for r in range(4):
                with spend(c,keep_passes=False):
                    t=time.perf_counter(); b=Batch.read(rt,ids,None,adapted.settings("prefill",1),num_new=32); tot.append(time.perf_counter()-t)
                t=time.perf_counter(); del b; T.setdefault("free",[]).append(time.perf_counter()-t)
            print(n,c,f"total {1e3*min(tot):.1f}",{k:f"{1e3*min(v):.2f}" for k,v in T.items()}, f"rest {1e3*(min(tot)-sum(min(v) for k,v in T.items() if k!='free')):.1f}")
