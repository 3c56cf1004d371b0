"""Command lines that the commands refuse, and after `->` what the sentence holds; test_bad_inputs.py runs them."""

EVAL = """
relu -> --data
relu --data '' -> --data; is empty
broken.gguf --data text.txt -> broken.gguf is a GGUF file; convert it first: stocha-convert broken.gguf OUT
absent.gguf --data text.txt -> absent.gguf does not exist; a checkpoint folder or a Hub id
nothing --data text.txt -> nothing/config.json does not exist; a Hugging Face checkpoint folder
'' --data text.txt -> MODEL; is empty
LONG --data text.txt -> bytes: expected at most 255
~nouser/x --data text.txt -> home folder of ~nouser, an unknown user
absent --data text.txt -> absent
automap5 --data text.txt -> config.json of automap5 has auto_map 5; expected a mapping
./absent --data text.txt -> ./absent; does not exist
text.txt --data text.txt -> text.txt; expected
relu --data absent.txt -> absent.txt does not exist
relu --data ./absent -> ./absent does not exist
relu --data LONG.jsonl -> bytes: expected at most 255
relu --data ~nouser/x.txt -> home folder of ~nouser, an unknown user
relu --data some/data-set -> some/data-set; Hub
relu --data nothing -> nothing holds no text
relu --data images -> images holds no text; .parquet
relu --data mixed -> mixed holds csv and text files; expected one kind
relu --data weights.bin -> weights.bin holds no text
relu --data empty.txt -> empty.txt; 0 tokens; at least one window
relu --data blank.txt -> blank.txt; 0 tokens
relu --data short.txt -> short.txt has 2 tokens; at least one window of 1024
relu --data latin.txt -> latin.txt is not in UTF-8; iconv
relu --data empty.jsonl -> empty.jsonl is empty
relu --data empty.json -> empty.json is empty
relu --data broken.json -> broken.json cannot be read
relu --data broken.jsonl -> row 3 of broken.jsonl
relu --data latin.jsonl -> latin.jsonl is not in UTF-8
relu --data nested.jsonl -> row 1 of nested.jsonl is nested too deep
relu --data notobject.jsonl -> row 2 of notobject.jsonl is a JSON list
relu --data number.jsonl -> 5 in the column text of row 3 of number.jsonl
relu --data numbers.jsonl -> 1 in the column text of row 1 of numbers.jsonl
relu --data null.jsonl -> every row of null.jsonl has null in the column text
relu --data columns.jsonl -> columns.jsonl has the columns body, id; 'text'
relu --data chatword.jsonl -> 'hello' in the column messages of row 1 of chatword.jsonl; a list of messages
relu --data chatwords.jsonl -> message 'hello' in the column messages of row 1; role and content
relu --data chatmixed.jsonl -> 'hello' in the column messages of row 2 of chatmixed.jsonl
relu --data chatnocontent.jsonl -> {'role': 'user'} in the column messages of row 1; role and content
relu --data chatnumber.jsonl -> content 5 in the column messages of row 1 of chatnumber.jsonl
relu --data prompts.jsonl -> 'w5' in the column prompt of row 1 of prompts.jsonl
relu --data ids.jsonl -> token ids; expected text
relu --data broken.csv -> broken.csv; line 3
relu --data head.csv -> head.csv is empty
relu --data broken.parquet -> broken.parquet is truncated or no parquet file
relu --data empty.parquet -> empty.parquet is empty
relu --tasks '' -> --tasks is ''; humaneval
relu --tasks humaneval -> humaneval runs code; --run-code
relu --tasks bigbench: -> names no task of BIG-bench
relu --tasks bigbench:absent --task-data nothing -> BIG-bench's absent are not here; task.json
relu --tasks bigbench:absent --task-data ./absent -> task data ./absent does not exist
relu --tasks bigbench:absent --limit 0 -> --limit is 0; at least 1
relu --tasks bigbench:absent --batch-size many -> --batch-size is many
relu --tasks bigbench:absent --results text.txt -> --results text.txt cannot be written; a folder
relu --tasks bigbench:absent --windows 2 -> --windows is given without --data
relu --data text.txt --run-code -> --run-code is given without --tasks
relu --data text.txt --lossless -> --lossless is given without --tasks
./absent --tasks bigbench:absent -> ./absent does not exist
relu --data text.txt --length 1 -> --length is 1; at least 2
relu --data text.txt --length -5 -> --length is -5
relu --data text.txt --length many -> --length is many; whole number
relu --data text.txt --length 16.5 -> --length is 16.5
relu --data text.txt --length 99999999999999999999 -> --length is 99999999999999999999
relu --data text.txt --windows 0 -> --windows is 0; at least 1
relu --data text.txt --mode swiglu -> --mode is swiglu; relu
relu --data text.txt --dtype int4 -> --dtype is int4; bfloat16
relu --data text.txt --cett 1 -> --cett is 1; below 1
relu --data text.txt --cett 0.1 -0.5 -> --cett is -0.5
relu --data text.txt --cett -> --cett
relu --data text.txt --cett nan -> --cett is nan
relu --data text.txt --ppl-increase 0 -> --ppl-increase is 0; above 0
relu --data text.txt --ppl-increase inf -> --ppl-increase is inf
relu --data text.txt --cett 0.1 --mode stocha -> --mode is stocha; deterministic
relu --data text.txt --plot x.nonsense -> x.nonsense; plot.png
relu --data text.txt --plot absent/x.png -> absent; does not exist
relu --data text.txt --colour red -> --colour red
relu --data text.txt --length 16 --mode topk -> --mode topk cannot run; k is None
relu --data text.txt --baseline '' -> --baseline; is empty
relu --data text.txt --length 16 --baseline truncated -> truncated; download it again
relu --data text.txt --length 16 --baseline vocabulary -> the token 63; only 16 tokens
truncated --data text.txt --length 16 -> truncated or corrupt
corrupt --data text.txt --length 16 -> corrupt
pickle --data text.txt --length 16 -> only pickle weights (pytorch_model.bin); safetensors
noweights --data text.txt --length 16 -> no weights
noconfig --data text.txt --length 16 -> config.json does not exist
badconfig --data text.txt --length 16 -> badconfig/config.json cannot be read
binaryconfig --data text.txt --length 16 -> binaryconfig/config.json cannot be read
listconfig --data text.txt --length 16 -> listconfig/config.json holds a JSON list
nestedconfig --data text.txt --length 16 -> nestedconfig/config.json cannot be read
gpt2 --data text.txt --length 16 -> model_type 'gpt2'; llama
typeless --data text.txt --length 16 -> model_type
numbertype --data text.txt --length 16 -> model_type 5
quantized --data text.txt --length 16 -> quantized (gptq)
missing --data text.txt --length 16 -> layers.0.self_attn.q_proj.weight; missing
extra --data text.txt --length 16 -> layers.0.mlp.gate_proj.weight; [4, 4]
zerolayers --data text.txt --length 16 -> num_hidden_layers 0
truelayers --data text.txt --length 16 -> num_hidden_layers True
wordlayers --data text.txt --length 16 -> num_hidden_layers 'two'
stocha5 --data text.txt --length 16 -> stocha
stochalist --data text.txt --length 16 -> stocha
unknownactivation --data text.txt --length 16 -> activation is 'swiglu'
listactivation --data text.txt --length 16 -> activation is ['relu']
unknownkey --data text.txt --length 16 -> ['colour']
threethresholds --data text.txt --length 16 -> threshold; 3
cutsshape --data text.txt --length 16 -> inputs.thresholds.q_proj is [0.1, 0.2, 0.3]; 2 numbers
cuts5 --data text.txt --length 16 -> inputs is 5; a mapping
wordthreshold --data text.txt --length 16 -> threshold is 'low'
source5 --data text.txt --length 16 -> source
history5 --data text.txt --length 16 -> history
base5 --data text.txt --length 16 -> base
notokenizer --data text.txt --length 16 -> notokenizer has no tokenizer; tokenizer.json
badtokenizer --data text.txt --length 16 -> tokenizer of badtokenizer cannot be read
emptytokenizer --data text.txt --length 16 -> tokenizer of emptytokenizer cannot be read
vocabulary --data text.txt --length 16 -> only 16 tokens; tokenizer
nan --data text.txt --length 16 -> loss is nan; weights
nan --data text.txt --length 16 --json -> loss is nan; weights
"""

GENERATE = """
broken.gguf --prompt w5 -> broken.gguf is a GGUF file; convert it first
relu/config.json --prompt w5 -> relu/config.json is not a folder; a checkpoint folder or a Hub id
relu -> no prompt; --prompt TEXT
relu --prompt '' -> empty; --prompt TEXT
relu --prompt ' ' -> empty
'' --prompt w5 -> MODEL; is empty
LONG --prompt w5 -> bytes: expected at most 255
~nouser/x --prompt w5 -> home folder of ~nouser, an unknown user
absent --prompt w5 -> absent
relu --prompts absent.txt -> --prompts absent.txt cannot be read
relu --prompts nothing -> --prompts nothing cannot be read
relu --prompts latin.txt -> --prompts latin.txt cannot be read
relu --prompts blank.txt -> --prompts blank.txt is empty
relu --prompts '' -> --prompts; is empty
relu --prompt w5 --samples 0 -> --samples is 0; at least 1
relu --prompt w5 --samples two -> --samples is two
relu --prompt w5 --new 0 -> --new is 0
relu --prompt w5 --new 1e3 -> --new is 1e3
relu --prompt w5 --p 1.5 -> --p is 1.5; between 0 and 1
relu --prompt w5 --p nan -> --p is nan
relu --prompt w5 --temperature 0 -> --temperature is 0; above 0
relu --prompt w5 --temperature inf -> --temperature is inf
relu --prompt w5 --decoding beam -> --decoding is beam; stocha, temperature, greedy
relu --prompt w5 --decoding greedy --p 0.5 -> --p is given; greedy
relu --prompt w5 --seed -1 -> --seed is -1
relu --prompt w5 --seed 9223372036854775808 -> --seed is 9223372036854775808
relu --prompt w5 --dtype float8 -> --dtype is float8
relu --prompt w5 --plot x -> the plot's name is x
relu --prompt w5 --plot x.png --samples 1 -> --samples is 1; at least 2
truncated --prompt w5 -> truncated or corrupt
pickle --prompt w5 -> only pickle weights
notokenizer --prompt w5 -> notokenizer has no tokenizer
badtokenizer --prompt w5 -> tokenizer of badtokenizer cannot be read
vocabulary --prompt w50 -> the token 50; only 16 tokens
nan --prompt 'w5 w5 w5 w5 w5 w5 w5 w5 w5' -> logits are NaN or infinite
nan --prompt 'w5 w5 w5 w5 w5 w5 w5 w5 w5' --temperature 1 -> logits are NaN or infinite
nan --prompt 'w5 w5 w5 w5 w5 w5 w5 w5 w5' --decoding greedy --json -> logits are NaN or infinite
gpt2 --prompt w5 -> model_type 'gpt2'
stocha5 --prompt w5 -> stocha
"""

BENCH = """
broken.gguf -> broken.gguf is a GGUF file; convert it first: stocha-convert broken.gguf OUT
 -> nothing to measure; --shape
'' -> MODEL; is empty
absent -> absent
relu --batch 0 -> --batch is 0; at least 1
relu --batch 1.5 -> --batch is 1.5
relu --prompt 0 -> --prompt is 0
relu --new -1 -> --new is -1
relu --recall 0.5 -> --recall is 0.5; above 0.5
relu --recall 2 -> --recall is 2
relu --recall nan -> --recall is nan
relu --dtype int8 -> --dtype is int8
relu --plot x.png -> none is measured; --shape
--shape 2048 -> --shape is 2048; hidden_size
--shape 8,0 -> --shape is 8,0
--shape 8,16,24 -> --shape is 8,16,24
--shape a,b -> --shape is a,b
--shape '' -> --shape is ''
--shape 8,16 --sparsity 1 -> --sparsity is 1; below 1
--shape 8,16 --sparsity nan -> --sparsity is nan
--shape 8,16 --tokens 9 -> --tokens is 9; from 1 to 8
--shape 8,16 --tokens 0 -> --tokens is 0
--shape 8,16 --plot x.nonsense -> x.nonsense
--shape 999999999,999999999 -> not enough memory
--random 7b -> --random is 7b; 1b, 3b
--random 1b --sparsity -0.1 -> --sparsity is -0.1
native -> its native activation; --activation relu
stocha -> silu; skips no neuron
truncated -> truncated or corrupt
stocha5 -> stocha
unknownactivation -> activation is 'swiglu'
"""

CARD = """
broken.gguf eval.json -> broken.gguf is a GGUF file; convert it first
relu eval.json --tasks absent.json -> absent.json cannot be read
relu eval.json --tasks eval.json -> eval.json has no tasks
relu -> EVAL
relu '' -> EVAL; is empty
'' eval.json -> FOLDER; is empty
absent eval.json -> absent does not exist; a checkpoint folder
native eval.json -> native is not a stocha checkpoint
stocha5 eval.json -> stocha5 is not a stocha checkpoint
badconfig eval.json -> badconfig/config.json cannot be read
nestedconfig eval.json -> nestedconfig/config.json cannot be read
unknownactivation eval.json -> activation is 'swiglu'
truncated eval.json -> truncated
relu absent.json -> absent.json cannot be read
relu LONG -> bytes: expected at most 255
relu nothing -> nothing cannot be read
relu nested.json -> nested.json cannot be read; stocha-eval --json
relu latin.json -> latin.json cannot be read
relu text.txt -> text.txt cannot be read
relu number.json -> number.json has no perplexity
relu text.json -> text.json has no perplexity
relu null.json -> null.json has no perplexity
relu e-list.json -> e-list.json has no perplexity
relu bench.json -> bench.json has no perplexity
relu e-word.json -> e-word.json has perplexity '12'; a finite number
relu e-null.json -> e-null.json has perplexity None
relu e-nan.json -> e-nan.json has perplexity nan
relu e-inf.json -> e-inf.json has perplexity inf
relu e-true.json -> e-true.json has tokens True; a whole number
relu e-zeros.json -> e-zeros.json has sparsity 0.5; an object
relu e-nolayers.json -> e-nolayers.json has sparsity of no layer
relu e-layers.json -> e-layers.json has sparsity.per_layer.1 'x'
relu e-reuse.json -> e-reuse.json has no reuse
relu e-hardware.json -> e-hardware.json has hardware None; a text
relu e-data.json -> e-data.json has data ['a']; a text
relu e-activation.json -> e-activation.json has activation 5
relu e-other.json -> e-other.json was measured on weights 000000000000
relu e-noweights.json -> e-noweights.json was measured on weights None
relu e-baseline.json -> the baseline in e-baseline.json has no perplexity
relu e-baseline5.json -> the baseline in e-baseline5.json has at its top 5
relu e-kl.json -> e-kl.json has kl 'far'
relu e-lengths.json -> e-lengths.json has aggregated_sparsity of different lengths
relu eval.json --row unlabelled.json -> --row is unlabelled.json; LABEL=EVAL
relu eval.json --row '=eval.json' -> --row is =eval.json
relu eval.json --row 'a=' -> --row is a=
relu eval.json --row a=eval.json --row a=eval.json -> one LABEL twice
relu eval.json --row a=absent.json -> absent.json cannot be read
relu eval.json --row a=e-word.json -> e-word.json has perplexity '12'
relu eval.json --row a=e-length64.json -> the row 'a' has length 64; 32; same options
relu eval.json --bench eval.json -> eval.json has no dense_ms; stocha-bench FOLDER --json
relu eval.json --bench b-word.json -> b-word.json has dense_ms 'slow'
relu eval.json --bench b-zero.json -> b-zero.json has a step of no time
relu eval.json --bench b-two.json -> b-two.json has no dense_ms
relu eval.json --bench b-empty.json -> b-empty.json has no dense_ms
relu eval.json --bench b-nobatch.json -> b-nobatch.json has no batch
relu eval.json --bench b-gbps.json -> b-gbps.json has read_gbps None
relu eval.json --bench b-other.json -> b-other.json was measured on weights 111111111111
relu eval.json --generation g-runs.json -> g-runs.json has runs 5; a list
relu eval.json --generation g-run.json -> run 0 in g-run.json has at its top 5
relu eval.json --generation g-decoding.json -> run 0 in g-decoding.json has decoding 'beam'
relu eval.json --generation g-p.json -> run 0 in g-p.json has no p
relu eval.json --generation g-bleu.json -> run 0 in g-bleu.json has self_bleu 'high'
relu eval.json --generation g-prompts.json -> g-prompts.json has prompts 'a'; a list
relu eval.json --generation g-other.json -> g-other.json was measured on weights None
"""

CONVERT = """
native -> OUTPUT
'' out -> SOURCE; is empty
native '' -> OUTPUT; is empty
native LONG -> bytes: expected at most 255
LONG out -> bytes: expected at most 255
~nouser/x out -> home folder of ~nouser, an unknown user
native ~nouser/x -> home folder of ~nouser, an unknown user
absent out -> absent
./absent out -> absent does not exist
absent.gguf out -> absent.gguf does not exist
native relu -> relu exists; --overwrite
native text.txt -> text.txt exists
native text.txt --overwrite -> text.txt is not a checkpoint folder
native text.txt/out -> cannot write text.txt/out
native out --activation swiglu -> --activation is swiglu; relu
native out --activation topk -> k is None
native out --activation topk --k 0 -> --k is 0; at least 1
native out --activation topk --k 100000000 -> k is 100000000; 48
native out --activation topk --k many -> --k is many
native out --p 1.5 -> --p is 1.5; between 0 and 1
native out --p half -> --p is half
native out --p nan -> --p is nan
native out --positive gelu -> --positive is gelu; silu, relu, drawn
native out --inference stocha -> --inference is stocha; relu
native out --threshold -1 -> --threshold is -1; 0 or more
native out --threshold inf -> --threshold is inf
native out --dtype int4 -> --dtype is int4
native out --base-model '' -> --base-model is ''; org/name
native out --base-model 'a b' -> --base-model is a b; org/name
native out --base-model 'org/x # Injected' -> --base-model is org/x; Injected; org/name
native out --base-model a/b/c -> --base-model is a/b/c
native out --push-to-hub '' -> --push-to-hub is ''; org/name
native out --push-to-hub ../x -> --push-to-hub is ../x
native out --private -> --private; --push-to-hub
native out --revision main -> --revision main; leave --revision out
native out --refit '' -> --refit; is empty
native out --refit text.txt --refit-tokens 0 -> --refit-tokens is 0; at least 1
native out --refit text.txt --refit-tokens -5 -> --refit-tokens is -5
native out --refit text.txt --target-sparsity 1 -> --target-sparsity is 1; between 0 and 1
native out --refit text.txt --activation silu -> silu; relu
org/absent out --refit absent.txt -> absent.txt does not exist
native out --target-sparsity 0.5 -> without refit
native out --inputs 1.5 --calibrate text.txt -> --inputs is 1.5; below 1
native out --inputs nan --calibrate text.txt -> --inputs is nan
native out --inputs -0.1 --calibrate text.txt -> --inputs is -0.1
native out --inputs half --calibrate text.txt -> --inputs is half
native out --inputs 0.4 -> without text; --calibrate DATA
native out --inputs 0.4 --calibrate '' -> --calibrate; is empty
org/absent out --inputs 0.4 --calibrate absent.txt -> absent.txt does not exist
org/absent out --inputs 0.4 --calibrate empty.jsonl -> empty.jsonl is empty
native out --inputs 0.4 --calibrate short.txt -> short.txt has fewer than 64 tokens; one window
native out --inputs 0.4 --calibrate text.txt --calibrate-tokens 0 -> --calibrate-tokens is 0; at least 1
native out --inputs 0.4 --calibrate text.txt --inputs-allotment fair -> --inputs-allotment is fair; greedy, output
native out --inputs 0.4 --calibrate text.txt --inputs-of lm_head -> --inputs-of is lm_head; q_proj
native out --inputs 0.4 --calibrate text.txt --refit text.txt -> with refit; convert the refitted folder again
native out --inputs 0 --calibrate text.txt -> data was given; above 0
native out --inputs 0 --inputs-prefill -> prefill was given; above 0
native out --calibrate text.txt -> calibrate was given without inputs
native out --inputs-train -> inputs_train was given without inputs
cuts out --inputs-fallback-tokens 9 -> --inputs-fallback-tokens is 9; from 1 to 8
cuts out --inputs-fallback-tokens 8 -> inputs_fallback_tokens 8 was given for; no fallback; expected inputs_fallback
cuts out --inputs-fallback-tokens 8 --inputs-fallback 0 -> with inputs_fallback 0; one of them
native out --inputs-fallback-tokens 8 --inputs-fallback 0.5 -> cuts no inputs; a folder that does
vocabulary out --inputs 0.4 --calibrate text.txt -> only 16 tokens
notokenizer out --inputs 0.4 --calibrate text.txt -> no tokenizer
cuts out --refit text.txt -> cuts its projections' inputs; --inputs 0
cutsshape out -> inputs.thresholds.q_proj is [0.1, 0.2, 0.3]; 2 numbers
cutsword out -> inputs.thresholds is {'q_proj': ['low', 0.1]}
cutsname out -> inputs.thresholds is {'lm_head': [0.1, 0.1]}; q_proj
cutscentre out -> inputs.centres is {'k_proj': [0.1, 0.1]}; have thresholds
cutsempty out -> inputs.thresholds is None
cuts5 out -> inputs is 5; a mapping
cutskey out -> ['colour']; share
cutsprefill out -> inputs.prefill is 1; true or false
cutsshare out -> inputs.share is 40
truncated out -> truncated or corrupt
corrupt out -> corrupt
pickle out -> only pickle weights
noweights out -> no weights
noconfig out -> config.json does not exist
badconfig out -> config.json cannot be read
nestedconfig out -> config.json cannot be read
gpt2 out -> model_type 'gpt2'
numbertype out -> model_type 5
namelessclass out -> architectures [None]
noclasses out -> architectures True
quantized out -> quantized (gptq)
missing out -> q_proj.weight; missing
extra out -> [4, 4]
zerolayers out -> num_hidden_layers
truelayers out -> num_hidden_layers
wordlayers out -> num_hidden_layers
stocha5 out -> stocha
unknownactivation out --activation relu2 -> activation is 'swiglu'
unknownkey out -> colour
threethresholds out -> threshold; 3
source5 out -> source
history5 out -> history
relu relu --overwrite -> relu
native /sys/stocha/out -> cannot write /sys/stocha/out
native out --liger -> --liger
native out --bits 3 -> --bits is 3; 4 or 8
native out --bits four -> --bits is four; 4 or 8
native out --bits 8 --calibrate text.txt -> calibrate was given without inputs
native out --bits 8 --in-8-bits v_proj -> in_8_bits v_proj was given with bits 8; bits below 8
native out --bits 4 --calibrate-tokens 100 -> calibrate_tokens 100 was given without calibrate
native out --bits 4 --calibrate short.txt -> short.txt has too little text; 4 windows
org/absent out --bits 4 --calibrate columns.jsonl -> columns.jsonl has the columns body, id
org/absent out --bits 4 --calibrate ids.jsonl -> token ids; expected text
native out --bits 4 --refit text.txt -> bits was given with refit; refit first
quantized4 out --bits 4 -> quantized4 is quantized to 4 bits; quantizing
quantized4 out --refit text.txt -> quantized4 is quantized to 4 bits; a refit
fivebits out -> bits is 5; 4 or 8
newformat out -> format is 3; newer stocha_hf
uncoded out -> layers.0.mlp.down_proj.codes; missing
wrongcodes out -> (I8); U8
unconverted4 out -> not a stocha checkpoint
broken.gguf out -> broken.gguf
mixtral out -> model_type 'mixtral'; dense gated
typeless out -> model_type None
awq out -> quantized (awq); original model
bitsandbytes out -> quantized (bitsandbytes)
fp8config out -> quantized (fp8)
fp8 out -> F8_E4M3; BF16, F16, F32
otheract out -> 'gelu_new'; expected 'silu'
owncode out -> its own modeling code
gateless out -> gate_proj
width out -> [48, 32]; [64, 32]
threelayers out -> layers.2.
empty out -> truncated or corrupt
fewbytes out -> truncated or corrupt
noshard out -> model-00002; missing
cutshard out -> model-00002; truncated or corrupt
indexup out -> '../../x'; same folder
indexroot out -> '/etc/passwd'
indexfile out -> a.safetensors; missing
indextensor out -> other
noindex out -> no weight_map
"""

AVERAGE = """
org/absent broken.gguf out -> broken.gguf is a GGUF file; convert it first
relu -> OUTPUT
relu out -> at least two
relu stocha out -> stocha; relu
relu relu relu -> relu exists
relu native out -> native is not a stocha checkpoint
relu relu out --shares 1 -> 2 positive numbers
relu relu out --shares 1 0 -> --shares is 0; above 0
relu relu out --shares 1 -1 -> --shares is -1
relu relu out --shares 1 nan -> --shares is nan
relu relu out --shares 1 many -> --shares is many
relu relu out --shares 1e308 1e308 -> shares; 1e+308
'' relu out -> FOLDER; is empty
relu absent out -> absent
relu truncated out -> truncated or corrupt
relu threethresholds out -> threshold; 3
relu wordthreshold out -> threshold is 'low'
relu missing out -> q_proj.weight
relu relu LONG -> bytes: expected at most 255
quantized4 quantized4 out -> quantized4 is quantized to 4 bits; an average
relu relu text.txt/out -> cannot write
"""

EXPORT = """
org/absent out.gguf --format powerinfer --data absent.txt -> absent.txt does not exist
relu -> OUT
'' out.gguf -> FOLDER; is empty
relu '' -> OUT; is empty
relu LONG.gguf -> bytes: expected at most 255
absent out.gguf -> absent
./absent out.gguf -> absent does not exist
relu out -> out is not the name of a GGUF file; .gguf
relu broken.gguf -> broken.gguf exists; --overwrite
relu letters.gguf --overwrite -> letters.gguf is not a GGUF file
relu text.txt/out.gguf -> cannot write text.txt/out.gguf
relu out.gguf --format onnx -> --format is onnx; gguf
relu out.gguf --precision q2 -> --precision is q2; q8_0
relu out.gguf --precision q4_0 -> llama-quantize, which is not on PATH; q8_0
relu out.gguf --activation relu2 -> --activation is relu2; relu, silu
relu out.gguf --activation gelu_pytorch_tanh -> activation is 'gelu_pytorch_tanh'; relu, silu
relu out.gguf --revision main -> --revision main; leave --revision out
relu out.gguf -> tokenizer of relu is of the type WordLevel; SmolLM
relu2 out.gguf -> relu2 infers with relu2; --activation relu
notokenizer out.gguf -> notokenizer has no tokenizer
quantized4 out.gguf -> quantized4 is quantized to 4 bits; an export
truncated out.gguf -> truncated or corrupt
pickle out.gguf -> only pickle weights
missing out.gguf -> q_proj.weight; missing
stocha5 out.gguf -> stocha
gpt2 out.gguf -> model_type 'gpt2'
"""

PUBLISH = """
broken.gguf user/x -> broken.gguf is a GGUF file; convert it first
relu -> REPO
'' user/x -> FOLDER; is empty
relu '' -> REPO is ''; org/name
relu a/b/c -> REPO is a/b/c; org/name
relu 'user/x y' -> REPO is user/x y
absent user/x -> absent
native user/x -> not a stocha checkpoint
LONG user/x -> bytes: expected at most 255
truncated user/x -> truncated or corrupt
pickle user/x -> only pickle weights
badconfig user/x -> config.json cannot be read
stocha5 user/x -> stocha
unknownactivation user/x -> activation is 'swiglu'
missing user/x -> q_proj.weight
measured user/x -> evaluation.json was measured on weights 000000000000
mangled user/x -> evaluation.json cannot be read
uncoded user/x -> layers.0.mlp.down_proj.codes; missing
relu user/x --colour -> --colour
"""

TRAIN = """
--config good.yaml --model_name_or_path broken.gguf -> broken.gguf is a GGUF file; convert it first
--use_cpu true --bf16 false -> model_name_or_path is missing
--config -> --config
--config '' -> the recipe
--config absent.yaml -> absent.yaml is not a file
--config LONG -> xxx
--config ~nouser/x.yaml -> ~nouser
--config nothing -> nothing is not a file
--config broken.yaml -> broken.yaml is not YAML
--config binary.yaml -> binary.yaml is not YAML
--config list.yaml -> list.yaml holds no keys
--config word.yaml -> word.yaml holds no keys
--config empty.yaml -> empty.yaml holds no keys
--config alias.yaml -> alias.yaml; alias
--config good.yaml --output_dir stocha -> output_dir is stocha, a model that the run reads; another folder
--config good.yaml --output_dir text.txt -> cannot write text.txt; a folder
--config good.yaml --output_dir text.txt/x -> cannot write text.txt/x in; text.txt: expected a folder
--config twice.yaml -> the key max_steps is there twice; each once
--config attention.yaml -> flash_attention_9; sdpa
--config good.yaml --resume_from_checkpoint out -> resume_from_checkpoint is out; output_dir
--config unknown.yaml -> 'colour'
--config nomodel.yaml -> model_name_or_path is missing
--config nodata.yaml -> dataset is missing
--config twodata.yaml -> datasets is; expected one of the two
--config noshare.yaml -> a share above 0
--config absentshare.yaml -> absent.txt does not exist
--config noschedule.yaml -> schedule is missing
--config activation.yaml -> swiglu
--config activations.yaml -> relu
--config phases.yaml -> schedule
--config good.yaml --colour red -> --colour
--config good.yaml --max_length 0 -> max_length
--config good.yaml --per_device_train_batch_size -1 -> per_device_train_batch_size; -1
--config good.yaml --learning_rate fast -> learning_rate is 'fast'; a number
--config good.yaml --max_steps many -> max_steps is 'many'; a whole number
--config good.yaml --use_cpu maybe -> use_cpu is 'maybe'
--config good.yaml --use_liger_kernel true -> use_liger_kernel
--config good.yaml --target_sparsity 2 -> target_sparsity is 2
--config good.yaml --distill_temperature 0 -> distill_temperature is 0
--config good.yaml --distill_hidden 1 -> distill_hidden is 1
--config good.yaml --distill_hidden_end 0 -> distill_hidden_end is 0
--config good.yaml --threshold_shift true -> threshold_shift
--config good.yaml --loss_type dft -> loss_type is 'dft'
--config good.yaml --dataset_streaming true --max_steps -1 -> dataset_streaming
--config good.yaml --dataset absent.txt -> absent.txt does not exist
--config good.yaml --dataset '' -> is empty
--config good.yaml --dataset LONG.txt -> bytes: expected at most 255
--config good.yaml --dataset broken.jsonl -> row 3 of broken.jsonl
--config good.yaml --dataset chatmixed.jsonl -> row 2 of chatmixed.jsonl
--config good.yaml --dataset columns.jsonl -> columns.jsonl has the columns body, id
--config good.yaml --eval_dataset absent.txt -> absent.txt does not exist
--config good.yaml --model_name_or_path ./absent -> ./absent does not exist
--config good.yaml --model_name_or_path truncated -> truncated or corrupt
--config good.yaml --model_name_or_path pickle -> only pickle weights
--config good.yaml --model_name_or_path gpt2 -> model_type 'gpt2'
--config good.yaml --model_name_or_path stocha5 -> stocha
--config good.yaml --model_name_or_path quantized4 -> quantized4 is quantized to 4 bits; training
--config good.yaml --model_name_or_path notokenizer -> notokenizer has no tokenizer
--config good.yaml --teacher ./absent -> ./absent does not exist
--config good.yaml --teacher vocabulary -> 16
--config good.yaml --accelerate nosuch -> --accelerate is nosuch
--config good.yaml --num_processes 2 -> --num_processes is 2; --accelerate
"""

ANSWERS = """
broken.gguf prompts.jsonl out.jsonl -> broken.gguf is a GGUF file; convert it first
relu -> PROMPTS
relu prompts.txt -> OUT
relu text.txt out.csv -> out.csv; .parquet
relu text.txt absent/out.jsonl -> the folder absent does not exist
relu text.txt relu -> relu; .jsonl
relu absent.txt out.jsonl -> absent.txt does not exist
relu ./absent out.jsonl -> ./absent does not exist
relu blank.txt out.jsonl -> blank.txt is empty; one prompt per line
relu latin.txt out.jsonl -> latin.txt cannot be read
relu columns.jsonl out.jsonl -> columns.jsonl has the columns body, id; prompt or messages; --column
relu columns.jsonl out.jsonl --column title -> columns.jsonl has the columns body, id; expected title
relu broken.jsonl out.jsonl -> row 3 of broken.jsonl
relu chatword.jsonl out.jsonl -> 'hello'
relu chatword.jsonl out.jsonl --plain --column absent -> expected absent
'' text.txt out.jsonl -> MODEL; is empty
absent text.txt out.jsonl -> absent
truncated text.txt out.jsonl -> truncated or corrupt
notokenizer text.txt out.jsonl -> notokenizer has no tokenizer
relu text.txt out.jsonl --new 0 -> --new is 0
relu text.txt out.jsonl --samples none -> --samples is none
relu text.txt out.jsonl --temperature -1 -> --temperature is -1; 0 or more
relu text.txt out.jsonl --top-p 0 -> --top-p is 0; above 0
relu text.txt out.jsonl --limit 0 -> --limit is 0
relu text.txt out.jsonl --times 0 --finish-prompts -> --times is 0
relu text.txt out.jsonl --times 2 -> --times is given without --finish-prompts
relu text.txt out.jsonl --prompt-ends x -> --prompt-ends is given without --finish-prompts
relu text.txt out.jsonl --finish-prompts --plain -> --finish-prompts is given with --plain
relu text.txt out.jsonl --finish-prompts --prompt-ends ( -> '('; regular expression
relu text.txt out.jsonl --finish-prompts --prompt-new 99999 -> the shortest beginning; give a shorter beginning
relu blank.txt out.jsonl --finish-prompts -> blank.txt is empty
"""

TABLES = {
    "answers": ANSWERS,
    "eval": EVAL,
    "generate": GENERATE,
    "bench": BENCH,
    "card": CARD,
    "convert": CONVERT,
    "average": AVERAGE,
    "export": EXPORT,
    "publish": PUBLISH,
    "train": TRAIN,
}
