"""Weights of files: what is read, what is matched, what is refused."""

import base64
import io
import json
import pickle
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.errors import CheckpointError, ConfigError, ModelError
from jmeta.models.weights import read_weights

# torch.save({"model": OrderedDict(...), "epoch": 3}) of PyTorch 2.13, as it writes now and as it wrote before 1.6
TORCH = {
    "zip": "c-oy*J#W)M7(UyHleiQ}2{h%Sd`w0_nxskUNK~z?;>AdWAf%{^<vJ#|aP6LRX`vEQCDbAWNWc$3m0;i>urh*}SeV!tfQbo-kvlsdww"
    "tz;lg}rg-{*N=-TS;(lbIL*$t2h@IFJSFQ%x1Axs|(?Bxb<kkg-8OfPinrF<{wg>K3Fl&9N+9L#AW5xf^a%clG9isUZ&17weGW8$?UZt?6dVKrp5u"
    "$JLCS(m|%x<`h?7>X=qjLAu>`TxGS$!8p%15*X9Qk!nkatPkNN%TduSf0KiW28CntFxg=6s;zWjN@fw{ZpuJrWO@sZ$dt@%!9$M?lE)~5hwJc2V-"
    "yE3<=l>Kn|4cCRb6=0z=B3k<ho<G`Wk6ZqX5T@l*}M_%;VmK8JXII$9>)t2#(ib)(bS?M2JiDGA>m5d?&rIB0PopC<IRvK1_9nye56Vvk0E6!}A^Qg"
    "!L6iGvEc8>Evp1BKh&n!uCDPKxS>%I;KGi*D-g;ahFx3tm<wXS4I-!emM(-=-scc4@o9u?oN~evxKNy21T{Zmc6XoND`|<t?^HzQX&b=t-+r(mZ0}"
    "cU<AZ*0!#Oi?hso^A_W#L6Cq0{9GkP>CRiNB?#Yn^v97D9@{-uw-I&9#dHmqHf#>!-VH|({{Y4i4$nL{f>@gN3F?YbDpt>w{cV)UO(SP*p)1?FH7Z0"
    "xgevT+T{c-K;{^y?p39Qt25JRM<IfDQEs&#vRd=?1AKwheC-8Hd;)>U#(C}vX<OaEn}yilr^1VJdxR4e6tNtl@~=L^%ta;YNZ%XpcomIb`y+5GpD"
    "*9jiy!FyR!-jVn64E7SYBlE#M7{vu!Cmq6kpuo<)i^7A(&xG5S21C0o$`G{uNQmL3$Ix$=C@|>maIwD7px+}=RM3-Q6wmZgg(xcMuQ2NE09A~lg04!"
    "1P-8JLaAFh|EORylt9!8F2CT^}d$}7o$y^DTKD?&8o%$!%Yg9Jj{ZIJc{v8@;eN4)W_hbJ8Rzz=w",
    "legacy": "c-n1I%Wl*#6iwpHOdDuvd6#Elm2RR=I-O=#tq|(QJco@pC`uD+Vie-Jjxz|PO0#JNd;<%Xd<MV6Cm^xlI@2js8Y{lBkB`r}*LUiC^@"
    "=~=4u5aH`|)Zcm^#mY5sb%R`E1Rytg(_>rm~19TvbArU?YL8;7K90E_lq#Oe7^ZpP7fC{y64wB|h;A$T7G+Yav+WQfX*WhY{R~QbU`%%rzRa96^V="
    "bv^eq{P!~B1=uOt7ChDHT6r&3#ud+=id1{xYz=|<YzetZ@PUg_uE9;URB0Z>wH8I?#fl%*qR3*+%Sx(v5_-_`ebzDgATt?pXwR;AhlNb^n;Gaqhpi%"
    "K(A$ZkZg+Pl40reXu+*fUj%!$^?H3xn*VLkfI;U`n+LWBa<uAF(YDL595Uw;2bQGw%EJZnrCy9c!9PRVD<ufe&+;RP%<8~ND(O?j6!_|D55_G!OIGw"
    "<CYM;Q3nafQLw}x<=*?297jSI?8nrgcJbM-qH)c1P*Zm$P-QQb!Mdqy3F@0;*orv6aF<`5p$O)vOZra3&O#B}Jb>Cgf-dr<+-qIV=bFiD&7bDx~8="
    "7@9lpW|)o|1sUiaDX4qDbDW)e*utht~&",
}
SHAPE = jnp.ones((1, 3))


def written(content, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(content)
    return file


def safetensors(arrays):
    """The format in its own words: a length, a header in JSON, the bytes."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def network(outputs=2):
    model = jmeta.linen(jmeta.MLP(outputs=outputs, hidden=()))
    return model.init(jax.random.key(0), SHAPE)


def test_safetensors_are_read_in_all_their_kinds(tmp_path):
    arrays = {
        "a": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
        "b": ("BF16", np.asarray([1.5, -2.0], jnp.bfloat16)),
        "c": ("I64", np.asarray(7)),
        "d": ("F16", np.zeros((0, 3), np.float16)),
    }
    found = read_weights(written(safetensors(arrays), tmp_path, "x.safetensors"))
    assert found.keys() == arrays.keys()
    for name, (_, array) in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("form", TORCH)
def test_files_of_pytorch_are_read_without_it(form, tmp_path):
    file = written(zlib.decompress(base64.b85decode(TORCH[form])), tmp_path, "x.pth")
    found = read_weights(file)
    assert found.keys() == {"model.a.weight", "model.b.running_var", "model.h"}
    np.testing.assert_array_equal(found["model.a.weight"], [[0, 3], [1, 4], [2, 5]])  # a transposed view
    np.testing.assert_array_equal(found["model.b.running_var"], [1, 2, 3])
    assert (found["model.h"].dtype, float(found["model.h"][0])) == (jnp.bfloat16, 1.5)


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_would_run_code_is_refused_unread(old, tmp_path):
    content = pickle.dumps(Code())
    if not old:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("x/data.pkl", content)
        content = stream.getvalue()
    file = written(content, tmp_path, "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt holds builtins\.exec, which would run as code"):
        read_weights(file)


def damaged():
    whole = safetensors({"a": ("F32", np.zeros(4, np.float32))})
    cut = zlib.decompress(base64.b85decode(TORCH["legacy"]))[:-5]
    return {
        "cut.safetensors": whole[:-3],
        "none.safetensors": b"x",
        "shape.safetensors": whole.replace(b"[4]", b"[9]"),
        "cut.pth": cut,
        "none.pth": b"PK",
        "none.npz": b"no archive",
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_told(name, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{name} is damaged, or no \.\w+ file of weights; get it anew\.$"):
        read_weights(written(damaged()[name], tmp_path, name))


def test_missing_files_and_other_kinds_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.npz cannot be read \(No such file or directory\)"):
        jmeta.load_params(tmp_path / "none.npz", network())
    with pytest.raises(ConfigError, match=r"x\.h5 is of no kind that is read; give \.safetensors, \.npz, \.pth"):
        jmeta.load_params("x.h5", network())


def saved(tmp_path, **arrays):
    file = tmp_path / "weights.npz"
    np.savez(file, **arrays)
    return file


def test_weights_take_the_place_of_those_of_their_name_and_layout(tmp_path):
    kernel, mean = np.arange(6.0).reshape(2, 3), np.arange(3.0)
    file = saved(
        tmp_path, **{"net.fc.weight": kernel, "net.fc.bias": np.ones(2), "net.bn.running_mean": mean, "x": mean}
    )
    like = (
        {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, "own": jnp.ones(1)},
        {"batch_stats": {"bn": {"mean": jnp.zeros(3)}}},
    )
    (params, state), matched = jmeta.load_params(file, like, names={"net.": ""})
    np.testing.assert_array_equal(params["fc"]["kernel"], kernel.T)
    np.testing.assert_array_equal(state["batch_stats"]["bn"]["mean"], mean)
    assert params["fc"]["kernel"].dtype == jnp.float32
    assert float(params["own"][0]) == 1.0
    assert str(matched) == f"3 of 4 leaves are those of {file}; not there: 0/own; left in the file: x"
    again, _ = jmeta.load_params(file, like, names=lambda name: name.removeprefix("net."))
    jax.tree.map(np.testing.assert_array_equal, again, (params, state))


def test_a_kernel_of_a_convolution_is_turned_and_one_of_flax_is_not(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)  # out, in, height, width
    like = {"conv": {"kernel": jnp.zeros((2, 5, 3, 4))}}
    theirs, _ = jmeta.load_params(saved(tmp_path, **{"conv.weight": kernel}), like)
    ours, _ = jmeta.load_params(saved(tmp_path, **{"conv/kernel": kernel.transpose(2, 3, 1, 0)}), like)
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    np.testing.assert_array_equal(theirs["conv"]["kernel"][1, 4], kernel[:, :, 1, 4].T)


def test_other_shapes_and_other_networks_are_told(tmp_path):
    file = saved(tmp_path, **{"head.weight": np.ones((5, 3)), "head.bias": np.ones(5)})
    told = r"another shape: 0/head/bias \[5\] instead of \[2\], 0/head/kernel \[3, 5\] instead of \[3, 2\]; give"
    with pytest.raises(ModelError, match=told):
        jmeta.load_params(file, network())
    with pytest.raises(
        ModelError, match=r"no weights of .* there are head\.weight, head\.bias, and the network has a\.b"
    ):
        jmeta.load_params(file, {"a.b": jnp.ones(3)})
    (params, _), matched = jmeta.load_params(saved(tmp_path, x=np.ones(2), **{"head.bias": np.ones(2)}), network())
    assert matched.missing == ("0/head/kernel",)
    np.testing.assert_array_equal(params["head"]["bias"], [1, 1])


def test_a_learner_starts_at_given_weights():
    params, state = network(outputs=None)
    params = jax.tree.map(lambda x: x + 1.0, params)
    model = jmeta.pretrained(jmeta.linen(jmeta.MLP(outputs=None, hidden=())), params, state)
    task = jmeta.Task(jmeta.Examples(SHAPE, jnp.ones((1, 1))), jmeta.Examples(SHAPE, jnp.ones((1, 1))))
    start, _ = jmeta.prototypical(model).init(jax.random.key(1), task)
    jax.tree.map(np.testing.assert_array_equal, start, params)


def test_inputs_are_embedded_batch_by_batch():
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 1), np.uint8)
    model = jmeta.linen(jmeta.Conv4(outputs=None, features=2, groups=1, norm="running"))
    params, state = model.init(jax.random.key(0), jnp.asarray(jmeta.as_inputs(images[:1])))
    z = jmeta.embed(model, params, state, images, batch=3)
    whole, _ = model.apply(jax.random.key(0), params, state, jnp.asarray(jmeta.as_inputs(images)), train=False)
    np.testing.assert_allclose(z, whole, atol=1e-6)
    with pytest.raises(jmeta.DataError, match="there are no inputs to embed"):
        jmeta.embed(model, params, state, images[:0])
