/* SPDX-License-Identifier: MIT */
/*
 * Functions of which each instruction has a label: test_coverage_truth.py says for each argument which of them run.
 */
#include <linux/linkage.h>
#include <asm/alternative.h>
#include <asm/cpufeatures.h>

	.text

/* int branches_path(int which) */
SYM_FUNC_START(branches_path)
p00:	cmp	$2, %edi
p01:	jg	p06
p02:	je	p08
p03:	test	%edi, %edi
p04:	je	p11
p05:	jmp	p14
p06:	mov	$6, %eax
p07:	RET
p08:	mov	$8, %eax
p09:	dec	%edi
p10:	jmp	p15
p11:	mov	%edi, %eax
p12:	add	$12, %eax
p13:	xor	%ecx, %ecx
p14:	lea	1(%rdi), %eax	/* another path comes into the middle of this block */
p15:	xor	%edx, %edx
p16:	RET
SYM_FUNC_END(branches_path)

/* int branches_loop(int times): its body runs only if it is asked for */
SYM_FUNC_START(branches_loop)
l00:	xor	%eax, %eax
l01:	test	%edi, %edi
l02:	jle	l06
l03:	inc	%eax
l04:	dec	%edi
l05:	jnz	l03
l06:	RET
SYM_FUNC_END(branches_loop)

/* int branches_patched(void): when it is loaded the kernel puts no-operations in the place of the jump */
SYM_FUNC_START(branches_patched)
a00:	xor	%eax, %eax
a01:	ALTERNATIVE "jmp a03", "", X86_FEATURE_ALWAYS
a02:	inc	%eax
a03:	RET
SYM_FUNC_END(branches_patched)

/* int branches_never(void) */
SYM_FUNC_START(branches_never)
n00:	xor	%eax, %eax
n01:	RET
SYM_FUNC_END(branches_never)
